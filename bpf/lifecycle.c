/* lifecycle: which TCP connections the traced pods have, from established to closed.
 *
 * Hook:  cgroup sockops at the root of the cgroup tree; for connections that are older
 *        than the agent the tracepoint inet_sock_set_state, because sockops tells of the
 *        states of those only that it was asked for from within sockops. What is left when
 *        a socket is destroyed ends by the tracepoint tcp_destroy_sock.
 * Cost:  a branch per connection of the node, an entry per one of a traced pod; a
 *        look-up per state change.
 * Blind: connect(2) that finds no way, for which no connection is begun: failure.c.
 */
BPF_SOCKHASH(enrolled, u64, MAX_CONNECTIONS);

static inline struct connection *establish(void *sk, u32 netns, u64 cookie)
{
	u32 zero = 0;
	u64 key = (u64)sk;
	struct connection *empty = no_connection.lookup(&zero), *c;

	if (!empty)
		return 0;
	/* Also over what an earlier socket at this address may have left. */
	if (connections.update(&key, empty)) {
		lose(LOSS_CONNECTIONS_FULL);
		return 0;
	}
	c = connections.lookup(&key);
	if (!c)
		return 0;
	c->sock = key;
	c->cookie = cookie;
	c->netns = netns;
	c->scan[RESPONSE].is_response = 1;
	scan_next(&c->scan[RESPONSE]);
	return c;
}

static inline int is_to_be_traced(void *sk, u32 netns)
{
	return what_to_do(netns) & POLICY_TRACE && mark_of(sk) != AGENT_MARK;
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

/* The entry of a socket that the agent found at its start, made at the first hook that it
 * passes. NULL for all others that have none. */
static inline struct connection *adopt(void *sk)
{
	struct old_socket *old;
	struct connection *c;
	u64 cookie = 0;
	u32 netns;
	u8 role;

	KERNEL_READ(cookie, sk, sock_common, skc_cookie);
	if (!cookie)
		return 0;
	old = old_sockets.lookup(&cookie);
	if (!old)
		return 0;
	if (mark_of(sk) == AGENT_MARK) {
		old_sockets.delete(&cookie);
		return 0;
	}
	role = old->role;
	netns = netns_of(sk);
	if (!(what_to_do(netns) & POLICY_TRACE))
		return 0;
	old_sockets.delete(&cookie);
	c = establish(sk, netns, cookie);
	if (!c)
		return 0;
	c->role = role;
	c->old = 1;
	describe(c, sk);
	KERNEL_READ(c->retransmits, sk, tcp_sock, total_retrans);
	return c;
}

static inline struct connection *connection_of(void *sk)
{
	u64 key = (u64)sk;
	struct connection *c = connections.lookup(&key);

	return c ? c : adopt(sk);
}

/* The last bytes may have passed unseen. A FIN that write_seq counts is none of them. */
static inline void take_last_bytes(struct connection *c, void *sk)
{
	u32 write_seq = 0, copied_seq = copied_up_to(sk);

	KERNEL_READ(write_seq, sk, tcp_sock, write_seq);
	if ((s32)(copied_seq - c->recv_seq) > 0)
		received_up_to(c, copied_seq);
	sent_up_to(c, write_seq - c->fin_sent);
}

/* The connection is gone, or this end wants no more of it. */
static inline void close_exchanges(struct connection *c, void *sk)
{
	u32 error = 0, write_seq = 0, i;
	s32 missed;
	u8 response = c->scan[RESPONSE].state;
	u8 end;

	KERNEL_READ(error, sk, sock, sk_err);
	if (!c->error)
		c->error = error;
	error = c->error;
	if (c->tcp) {
		take_last_bytes(c, sk);
		tcp_part_ends(c, error ? END_RESET :
				 c->ended_first ? END_CLOSED_THERE : END_CLOSED_HERE);
		c->tcp = TCP_NO;
		return;
	}
	if (!c->open && !has_parked(c))
		return;
	/* The last of the request may have passed unseen (request_entry). */
	KERNEL_READ(write_seq, sk, tcp_sock, write_seq);
	missed = write_seq - c->fin_sent - c->send_seq;
	if (c->enrolled && missed > 0)
		c->request.bytes += scan_skip(&c->scan[REQUEST], missed);
	if (c->scan[REQUEST].state == SCAN_OPAQUE ||
	    (c->inherited && (missed || copied_up_to(sk) != c->recv_seq)))
		end = END_UNSEEN;
	else if (error)
		end = END_RESET;
	else if (response == SCAN_UNTIL_EOF && (c->role == ROLE_SERVER || ended_there(sk)))
		end = END_EOF;
	else if (ended_there(sk) && c->role == ROLE_CLIENT)
		end = END_CLOSED_THERE;
	else
		end = END_CLOSED_HERE;
	if (end != END_EOF && end != END_UNSEEN)
		c->response_last_ns = bpf_ktime_get_ns();
	for (i = 0; i <= PARKED_MAX; i++) {
		barrier();
		if (!c->open && !has_parked(c))
			break;
		finish(c, end);
	}
}

/* The connection was never made. Its context was kept when it was begun. */
static inline void connect_failed(struct connection *c, void *sk)
{
	u32 error = 0;

	KERNEL_READ(error, sk, sock, sk_err);
	c->error = error;
	c->connect_end_ns = bpf_ktime_get_ns();
	emit(c, &c->request, END_CONNECT_FAILED, PROTOCOL_TCP);
}

static inline void state_changed(struct connection *c, void *sk, u32 state)
{
	u64 key = (u64)sk;
	u32 error = 0;
	u8 shutdown = 0;

	if (state == TCP_CLOSE_WAIT) {
		c->ended_first = 1;
	} else if (state == TCP_FIN_WAIT1 || state == TCP_LAST_ACK) {
		/* close(2), or only shutdown(SHUT_WR), after which a response may come? */
		bpf_probe_read_kernel(&shutdown, 1, sk + OFFSET(sock, sk_shutdown));
		if ((shutdown & SHUTDOWN_MASK) == SHUTDOWN_MASK)
			close_exchanges(c, sk);
		else if (c->tcp)
			take_last_bytes(c, sk);
		c->fin_sent = 1;
	} else if (state == TCP_CLOSE) {
		if (c->connect_start_ns && !c->connect_end_ns && c->role == ROLE_CLIENT) {
			connect_failed(c, sk);
		} else if (unread(sk)) {
			/* Both sides have ended, and the application is still to read. It will
			 * be told an error only once: sk_err is zero then. */
			KERNEL_READ(error, sk, sock, sk_err);
			c->error = error;
			return;
		} else {
			close_exchanges(c, sk);
		}
		forget_claim(c);
		connections.delete(&key);
	}
}

/* bpf_get_current_pid_tgid, which sockops programs have since 6.10 only. */
static inline u64 current_thread(void)
{
	void *task = (void *)bpf_get_current_task();
	u32 pid = 0, tgid = 0;

	KERNEL_READ(pid, task, task_struct, pid);
	KERNEL_READ(tgid, task, task_struct, tgid);
	return (u64)tgid << 32 | pid;
}

/* A connection is begun: who would it belong to, if it fails? */
static inline void connect_begins(struct connection *c, void *sk)
{
	struct head_context none = {};
	struct request *q = &c->request;
	u64 thread = current_thread();

	c->role = ROLE_CLIENT;
	c->connect_start_ns = bpf_ktime_get_ns();
	describe(c, sk);
	attempts.delete(&thread);
	remember_thread(q, thread);
	if (child_of_served(q, thread))
		return;
	new_root(q);
	q->flags = decide(&none, c->netns, q->trace_id_low);
}

int lifecycle(struct bpf_sock_ops *ops)
{
	struct bpf_sock *pointer = ops->sk;
	struct connection *c;
	void *sk = 0;
	u64 key;
	u32 netns, before;
	int failed;

	if (!pointer)
		return 1;
	/* The verifier allows no arithmetic on the pointer; read back, it is a number. */
	bpf_probe_read_kernel(&sk, sizeof(sk), &pointer);
	key = (u64)sk;
	switch (ops->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		netns = netns_of(sk);
		if (!is_to_be_traced(sk, netns))
			return 1;
		/* A socket may be disconnected with answers unread, and used again. */
		c = connections.lookup(&key);
		if (c)
			close_exchanges(c, sk);
		c = establish(sk, netns, bpf_get_socket_cookie(ops));
		if (c) {
			c->watched = 1;
			c->whole = 1;
			connect_begins(c, sk);
			/* Made too late for an earlier connection of this address. */
			forget_claim(c);
			bpf_sock_ops_cb_flags_set(ops, BPF_SOCK_OPS_STATE_CB_FLAG);
		}
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		c = connections.lookup(&key);
		if (!c)
			return 1;
		c->connect_end_ns = bpf_ktime_get_ns();
		before = c->send_seq;
		describe(c, sk);
		/* Data went along with the SYN, which counts as one: tcp_fastopen. */
		if (c->send_seq - before > 1) {
			c->heads = 1;
			forsake(c, LOSS_BYTES_MISSED);
		}
		if (!(what_to_do(c->netns) & POLICY_ENROL) || is_mptcp(sk))
			break;
		/* A statement of its own: bcc's rewriting ends it with a semicolon. */
		failed = enrolled.sock_hash_update(ops, &key, BPF_NOEXIST);
		c->enrolled = !failed;
		if (failed)
			lose(LOSS_ENROL_FAILED);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		netns = netns_of(sk);
		if (!is_to_be_traced(sk, netns))
			return 1;
		c = establish(sk, netns, bpf_get_socket_cookie(ops));
		if (c) {
			c->watched = 1;
			c->role = ROLE_SERVER;
			describe(c, sk);
			bpf_sock_ops_cb_flags_set(ops, BPF_SOCK_OPS_STATE_CB_FLAG);
		}
		break;
	case BPF_SOCK_OPS_STATE_CB:
		c = connections.lookup(&key);
		if (c)
			state_changed(c, sk, ops->args[1]);
		break;
	}
	return 1;
}

RAW_TRACEPOINT_PROBE(inet_sock_set_state)
{
	u64 key = ctx->args[0];
	struct connection *c = connections.lookup(&key);

	if (c && !c->watched)
		state_changed(c, (void *)key, ctx->args[2]);
	return 0;
}

RAW_TRACEPOINT_PROBE(tcp_destroy_sock)
{
	void *sk = (void *)ctx->args[0];
	u64 key = (u64)sk, cookie = 0;
	struct connection *c = connections.lookup(&key);

	if (c) {
		close_exchanges(c, sk);
		forget_claim(c);
		connections.delete(&key);
	}
	KERNEL_READ(cookie, sk, sock_common, skc_cookie);
	if (cookie)
		old_sockets.delete(&cookie);
	return 0;
}
