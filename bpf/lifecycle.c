/* lifecycle: which TCP connections the traced pods have, from established to closed.
 *
 * Hook:  cgroup sockops at the root of the cgroup tree.
 * Cost:  a branch per connection of the node, an entry per one of a traced pod.
 * Blind: connections that were established before the agent.
 */
BPF_SOCKHASH(enrolled, u64, MAX_CONNECTIONS);

static inline struct connection *establish(void *sk, u32 netns)
{
	u32 zero = 0;
	u64 key = (u64)sk;
	struct connection *empty = no_connection.lookup(&zero), *c;

	if (!empty)
		return 0;
	c = connections.lookup(&key);
	if (!c) {
		if (connections.update(&key, empty)) {
			lose(LOSS_CONNECTIONS_FULL);
			return 0;
		}
		c = connections.lookup(&key);
		if (!c)
			return 0;
	}
	c->sock = key;
	c->netns = netns;
	c->scan[RESPONSE].is_response = 1;
	scan_next(&c->scan[RESPONSE]);
	return c;
}

/* A subflow in a sockhash breaks MPTCP's fallback to TCP before 6.6.118. */
static inline int is_mptcp(void *sk)
{
	u8 is = 0;

#ifdef OFFSET_tcp_sock__is_mptcp
	KERNEL_READ(is, sk, tcp_sock, is_mptcp);
#endif
	return is;
}

static inline void describe(struct connection *c, void *sk)
{
	u16 port = 0;

	KERNEL_READ(port, sk, sock_common, skc_num);
	c->local_port = port;
	KERNEL_READ(port, sk, sock_common, skc_dport);
	c->peer_port = port >> 8 | port << 8;
	address_of(c->local_addr, sk, 1);
	address_of(c->peer_addr, sk, 0);
	KERNEL_READ(c->send_seq, sk, tcp_sock, write_seq);
	KERNEL_READ(c->recv_seq, sk, tcp_sock, copied_seq);
}

/* The connection is gone, or this end wants no more of it. */
static inline void close_exchange(struct connection *c, void *sk)
{
	u32 error = 0, write_seq = 0;
	s32 missed;
	u8 response = c->scan[RESPONSE].state;
	u8 end;

	if (!c->open)
		return;
	/* The last of the request may have passed unseen (request_entry). A FIN that
	 * write_seq counts is none of the body's bytes, so it is not taken for one. */
	KERNEL_READ(write_seq, sk, tcp_sock, write_seq);
	missed = write_seq - c->send_seq;
	if (c->enrolled && missed > 0)
		c->request_bytes += scan_skip(&c->scan[REQUEST], missed);
	KERNEL_READ(error, sk, sock, sk_err);
	if (c->scan[REQUEST].state == SCAN_OPAQUE)
		end = END_UNSEEN;
	else if (error)
		end = END_RESET;
	else if (response == SCAN_UNTIL_EOF && (c->role == ROLE_SERVER || c->closing))
		end = END_EOF;
	else if (c->closing && c->role == ROLE_CLIENT)
		end = END_CLOSED_THERE;
	else
		end = END_CLOSED_HERE;
	if (end != END_EOF && end != END_UNSEEN)
		c->response_last_ns = bpf_ktime_get_ns();
	finish(c, end);
}

static inline void state_changed(struct bpf_sock_ops *ops, void *sk)
{
	u64 key = (u64)sk;
	struct connection *c = connections.lookup(&key);
	u32 state = ops->args[1];
	u8 shutdown = 0;

	if (!c)
		return;
	if (state == TCP_CLOSE_WAIT) {
		c->closing = 1;
	} else if (state == TCP_FIN_WAIT1 || state == TCP_LAST_ACK) {
		/* close(2), or only shutdown(SHUT_WR), after which a response may come? */
		bpf_probe_read_kernel(&shutdown, 1, sk + OFFSET(sock, sk_shutdown));
		if ((shutdown & SHUTDOWN_MASK) == SHUTDOWN_MASK)
			close_exchange(c, sk);
	} else if (state == TCP_CLOSE) {
		close_exchange(c, sk);
		connections.delete(&key);
	}
}

int lifecycle(struct bpf_sock_ops *ops)
{
	struct bpf_sock *pointer = ops->sk;
	struct connection *c;
	void *sk = 0;
	u64 key;
	u32 netns;
	int failed;

	if (!pointer)
		return 1;
	/* The verifier allows no arithmetic on the pointer; read back, it is a number. */
	bpf_probe_read_kernel(&sk, sizeof(sk), &pointer);
	key = (u64)sk;
	switch (ops->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		netns = netns_of(sk);
		if (!(policy_of(netns) & POLICY_TRACE))
			return 1;
		c = establish(sk, netns);
		if (c) {
			c->role = ROLE_CLIENT;
			c->connect_start_ns = bpf_ktime_get_ns();
			bpf_sock_ops_cb_flags_set(ops, BPF_SOCK_OPS_STATE_CB_FLAG);
		}
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		c = connections.lookup(&key);
		if (!c)
			return 1;
		c->connect_end_ns = bpf_ktime_get_ns();
		describe(c, sk);
		if (!(policy_of(c->netns) & POLICY_ENROL) || is_mptcp(sk))
			break;
		/* A statement of its own: bcc's rewriting ends it with a semicolon. */
		failed = enrolled.sock_hash_update(ops, &key, BPF_NOEXIST);
		c->enrolled = !failed;
		if (failed)
			lose(LOSS_ENROL_FAILED);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		netns = netns_of(sk);
		if (!(policy_of(netns) & POLICY_TRACE))
			return 1;
		c = establish(sk, netns);
		if (c) {
			c->role = ROLE_SERVER;
			describe(c, sk);
			bpf_sock_ops_cb_flags_set(ops, BPF_SOCK_OPS_STATE_CB_FLAG);
		}
		break;
	case BPF_SOCK_OPS_STATE_CB:
		state_changed(ops, sk);
		break;
	}
	return 1;
}
