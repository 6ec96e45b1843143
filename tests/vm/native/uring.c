/* uring: an HTTP/1.1 client and a server that send and receive by io_uring alone.
 *
 *   uring client ADDRESS PORT COUNT PATH	COUNT calls on one connection
 *   uring server ADDRESS			prints its port; answers until the peer closes
 *
 * Each operation is asked for before it can be done where that is possible (a receive on
 * an idle connection), so the kernel completes it later, in task work.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <liburing.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

static struct io_uring ring;

static void fail(const char *what, int error)
{
	fprintf(stderr, "uring: %s: %s\n", what, strerror(error));
	exit(1);
}

static int complete(const char *what)
{
	struct io_uring_cqe *cqe;
	int result;

	io_uring_submit(&ring);
	if (io_uring_wait_cqe(&ring, &cqe))
		fail("wait", errno);
	result = cqe->res;
	io_uring_cqe_seen(&ring, cqe);
	if (result < 0)
		fail(what, -result);
	return result;
}

static void send_all(int fd, const char *data, size_t size)
{
	while (size) {
		int sent;

		io_uring_prep_send(io_uring_get_sqe(&ring), fd, data, size, 0);
		sent = complete("send");
		data += sent;
		size -= sent;
	}
}

/* A head, read until its empty line; 0 where the peer has closed. */
static size_t receive_head(int fd, char *data, size_t room)
{
	size_t size = 0;

	do {
		int received;

		io_uring_prep_recv(io_uring_get_sqe(&ring), fd, data + size,
				   room - size - 1, 0);
		received = complete("receive");
		if (!received)
			return 0;
		size += received;
		data[size] = 0;
	} while (!strstr(data, "\r\n\r\n"));
	return size;
}

int main(int argc, char **argv)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	socklen_t length = sizeof(address);
	static char data[65536], head[1024];
	int fd = socket(AF_INET, SOCK_STREAM, 0), i;

	if (argc < 3 || io_uring_queue_init(8, &ring, 0))
		fail("start", errno);
	inet_pton(AF_INET, argv[2], &address.sin_addr);
	if (!strcmp(argv[1], "client")) {
		address.sin_port = htons(atoi(argv[3]));
		if (connect(fd, (struct sockaddr *)&address, sizeof(address)))
			fail("connect", errno);
		for (i = 0; i < atoi(argv[4]); i++) {
			snprintf(head, sizeof(head), "GET %s%d HTTP/1.1\r\nhost: %s:%s\r\n\r\n",
				 argv[5], i, argv[2], argv[3]);
			send_all(fd, head, strlen(head));
			if (!receive_head(fd, data, sizeof(data)))
				fail("response", ECONNRESET);
		}
		return 0;
	}
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)) || listen(fd, 8))
		fail("listen", errno);
	getsockname(fd, (struct sockaddr *)&address, &length);
	printf("%d\n", ntohs(address.sin_port));
	fflush(stdout);
	io_uring_prep_accept(io_uring_get_sqe(&ring), fd, NULL, NULL, 0);
	fd = complete("accept");
	while (receive_head(fd, data, sizeof(data))) {
		const char *answer = "HTTP/1.1 204 No Content\r\n\r\n";

		send_all(fd, answer, strlen(answer));
	}
	return 0;
}
