/* failure: connect(2) that finds no way to the peer, so that no connection is begun.
 *
 * Hook:  kprobe and kretprobe on tcp_v4_connect and tcp_v6_connect. These do not sleep, so
 *        the kretprobe's instances do not run out.
 * Cost:  a table look-up per connect(2) of the node, two changes per one of a traced pod.
 */
int connect_entry(struct pt_regs *ctx, void *sk, void *address)
{
	u64 thread = bpf_get_current_pid_tgid();
	struct attempt a = {};
	u16 family = 0, port = 0;

	a.netns = netns_of(sk);
	if (!is_to_be_traced(sk, a.netns))
		return 0;
	a.sock = (u64)sk;
	/* struct sockaddr_in and sockaddr_in6, which inet_stream_connect has copied. */
	bpf_probe_read_kernel(&family, sizeof(family), address);
	bpf_probe_read_kernel(&port, sizeof(port), address + 2);
	a.peer_port = port >> 8 | port << 8;
	if (family == AF_INET6) {
		bpf_probe_read_kernel(a.peer_addr, 16, address + 8);
	} else {
		a.peer_addr[10] = 0xff;
		a.peer_addr[11] = 0xff;
		bpf_probe_read_kernel(a.peer_addr + 12, 4, address + 4);
	}
	if (attempts.update(&thread, &a))
		lose(LOSS_THREADS_FULL);
	return 0;
}

int connect_return(struct pt_regs *ctx)
{
	u64 thread = bpf_get_current_pid_tgid(), key;
	struct attempt *a = attempts.lookup(&thread);
	struct connection *c;
	int result = PT_REGS_RC(ctx);

	/* Where a connection was begun, lifecycle.c has taken the attempt away. */
	if (!a)
		return 0;
	key = a->sock;
	c = result < 0 ? establish((void *)key, a->netns, 0) : 0;
	if (c) {
		connect_begins(c, (void *)key);
		c->peer_port = a->peer_port;
		__builtin_memcpy(c->peer_addr, a->peer_addr, sizeof(c->peer_addr));
		c->error = -result;
		c->connect_end_ns = bpf_ktime_get_ns();
		emit(c, &c->request, END_CONNECT_FAILED, PROTOCOL_TCP);
		connections.delete(&key);
	}
	attempts.delete(&thread);
	return 0;
}
