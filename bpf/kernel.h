/* kernel: the fields of kernel structs that the programs read.
 *
 * OFFSET(struct, field) is a number that agent/kernel/program.py takes from the
 * running kernel's BTF: every use in bpf/ is found there by this spelling. Where the
 * kernel has no such field there is no number, and #ifdef OFFSET_struct__field tells.
 * A struct sock begins with its struct sock_common, a tcp_sock with its sock.
 */
#ifndef PODSPAN_KERNEL_H
#define PODSPAN_KERNEL_H

#define OFFSET(type, field) OFFSET_##type##__##field
#define KERNEL_READ(to, base, type, field)                                     \
	bpf_probe_read_kernel(&(to), sizeof(to), (void *)(base) + OFFSET(type, field))
#define ENUMERATOR(type, name) ENUMERATOR_##type##__##name

#define AF_INET 2
#define AF_INET6 10
#define TCP_ESTABLISHED 1
#define TCP_FIN_WAIT1 4
#define TCP_CLOSE 7
#define TCP_CLOSE_WAIT 8
#define TCP_LAST_ACK 9
#define RCV_SHUTDOWN 1
#define SHUTDOWN_MASK 3
#define SOCK_DONE 1	/* in skc_flags: the peer's FIN has come */
#define MSG_PEEK 2
#define MSG_TRUNC 0x20

struct iov {
	u64 base;
	u64 length;
};

static inline u32 netns_of(void *sk)
{
	void *net = 0;
	u32 inode = 0;

	KERNEL_READ(net, sk, sock_common, skc_net);
	if (net)
		KERNEL_READ(inode, net + OFFSET(net, ns), ns_common, inum);
	return inode;
}

static inline u32 mark_of(void *sk)
{
	u32 mark = 0;

	KERNEL_READ(mark, sk, sock, sk_mark);
	return mark;
}

static inline int ended_there(void *sk)
{
	u64 flags = 0;

	KERNEL_READ(flags, sk, sock_common, skc_flags);
	return flags >> SOCK_DONE & 1;
}

/* copied_seq without the FIN that it counts once the application has read up to it. */
static inline u32 copied_up_to(void *sk)
{
	u32 copied_seq = 0, rcv_nxt = 0;

	KERNEL_READ(copied_seq, sk, tcp_sock, copied_seq);
	KERNEL_READ(rcv_nxt, sk, tcp_sock, rcv_nxt);
	if (ended_there(sk) && copied_seq == rcv_nxt)
		copied_seq--;
	return copied_seq;
}

static inline u32 unread(void *sk)
{
	u32 queued = 0;

	bpf_probe_read_kernel(&queued, sizeof(queued),
			      sk + OFFSET(sock, sk_receive_queue) +
			      OFFSET(sk_buff_head, qlen));
	return queued;
}

static inline void address_of(u8 *to, void *sk, int local)
{
	u16 family = 0;

	KERNEL_READ(family, sk, sock_common, skc_family);
	if (family == AF_INET) {
		__builtin_memset(to, 0, 10);
		to[10] = 0xff;
		to[11] = 0xff;
		if (local)
			bpf_probe_read_kernel(to + 12, 4,
				sk + OFFSET(sock_common, skc_rcv_saddr));
		else
			bpf_probe_read_kernel(to + 12, 4,
				sk + OFFSET(sock_common, skc_daddr));
	} else if (local) {
		bpf_probe_read_kernel(to, 16,
			sk + OFFSET(sock_common, skc_v6_rcv_saddr));
	} else {
		bpf_probe_read_kernel(to, 16, sk + OFFSET(sock_common, skc_v6_daddr));
	}
}

#endif
