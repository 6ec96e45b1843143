/* bytes: what traced sockets send and receive, apart from what request.c sees.
 *
 * Hooks: kprobes on tcp_sendmsg, tcp_sendpage (before 6.5), tcp_recvmsg and
 *        tcp_cleanup_rbuf. The last is called within tcp_recvmsg when data has been
 *        copied, in the reader's context: no kretprobe, whose instances run out while
 *        readers block. And on what event loops wait with, where a turn of theirs ends.
 * Cost:  a table look-up per send and receive of the node; some ten instructions per
 *        head byte of a traced pod, none per body byte.
 * Blind: what bytes say that pass by sendfile or splice; they can only be body.
 *
 * Positions are TCP sequence numbers (write_seq, copied_seq): a partial send that is
 * sent again is seen once, and a missed probe is noticed.
 */
#define STEP_WALK 0
#define STEP_HEAD 1

/* Where a call's bytes lie: an iovec array, or one segment. */
struct buffers {
	u64 vector;		/* struct iovec array in kernel memory, 0: none left */
	u64 base;		/* of the current segment */
	u64 length;		/* what is left of it */
	u32 count;		/* segments left in the array */
	u8 in_kernel;		/* the segments are kernel memory */
	u8 readable;
	u8 reserved[2];
};

/* A tcp_recvmsg under way, by thread. */
struct receive {
	struct buffers buffers;
	u64 sock;
	u32 from_seq;		/* copied_seq at its start */
	u32 seen;		/* bytes already scanned */
};

/* One call's bytes on their way through the scanner. Probes do not nest on a CPU. */
struct walk {
	struct buffers buffers;
	u64 key;
	u64 now_ns;
	u64 thread;
	u64 left;
	u64 ignore;		/* bytes at the start that were seen before */
	u32 limit;
	u32 cursor;
	u8 is_response;
	u8 reserved[7];
	u8 piece[SCAN_STEP];
};

BPF_PERCPU_ARRAY(walks, struct walk, 1);
BPF_HASH(receives, u64, struct receive, MAX_THREADS);
BPF_PROG_ARRAY(bytes_steps, 2);

static inline void find_buffers(struct buffers *b, void *msg)
{
	void *iter = msg + OFFSET(msghdr, msg_iter);
	u64 offset = 0, count = 0;
	struct iov first = {};
	u8 type = 0;

	__builtin_memset(b, 0, sizeof(*b));
	KERNEL_READ(type, iter, iov_iter, iter_type);
	KERNEL_READ(offset, iter, iov_iter, iov_offset);
#ifdef OFFSET_iov_iter__ubuf
	if (type == ENUMERATOR(iter_type, ITER_UBUF)) {
		KERNEL_READ(b->base, iter, iov_iter, ubuf);
		KERNEL_READ(b->length, iter, iov_iter, count);
		b->base += offset;
		b->readable = 1;
		return;
	}
#endif
	if (type != ENUMERATOR(iter_type, ITER_IOVEC) &&
	    type != ENUMERATOR(iter_type, ITER_KVEC))
		return;
#ifdef OFFSET_iov_iter____iov
	KERNEL_READ(b->vector, iter, iov_iter, __iov);
#else
	KERNEL_READ(b->vector, iter, iov_iter, iov);
#endif
	KERNEL_READ(count, iter, iov_iter, nr_segs);
	if (!count)
		return;
	bpf_probe_read_kernel(&first, sizeof(first), (void *)b->vector);
	b->base = first.base + offset;
	b->length = first.length - offset;
	b->vector += sizeof(first);
	b->count = count - 1;
	b->in_kernel = type == ENUMERATOR(iter_type, ITER_KVEC);
	b->readable = 1;
}

/* A server speaks first. HTTP/2's need not wait for the preface: their first frame is
 * SETTINGS, of no stream and no acknowledgement (RFC 9113 sections 3.4, 4.1 and 6.5). */
static inline void note_http2_server(struct connection *c, struct walk *w)
{
	struct iov first = {};
	u8 head[16] = {};

	if (!w->buffers.readable || w->ignore || c->old)
		return;
	first.base = w->buffers.base;
	first.length = w->buffers.length;
	if (!first.length && w->buffers.count)
		bpf_probe_read_kernel(&first, sizeof(first), (void *)w->buffers.vector);
	if (first.length < 9 || w->left < 9)
		return;
	bpf_probe_read_user(head, 9, (void *)first.base);
	if (!head[0] && head[3] == 4 && !head[4] && !head[5] && !head[6] && !head[7] &&
	    !head[8] && (head[1] || head[2] % 6 == 0))
		note_http2_port(c);
}

/* Take `left` bytes, the first `ignore` of which were seen before. */
static inline void take(struct pt_regs *ctx, struct connection *c, struct walk *w,
			int is_response)
{
	w->is_response = is_response;
	w->key = c->sock;
	if (message_begins(c, is_response, w->now_ns)) {
		bytes_steps.call(ctx, STEP_WALK);
	} else if (c->tcp == TCP_WANTED) {
		if (is_response)
			note_http2_server(c, w);
		tcp_begins(c, w->thread, w->now_ns);
	}
}

static inline void sends(struct pt_regs *ctx, void *sk, void *msg, u64 size)
{
	u32 zero = 0, again = 0, write_seq = 0;
	struct connection *c = connection_of(sk);
	struct walk *w = walks.lookup(&zero);
	int is_response;

	if (!c || !w || c->enrolled || !size)
		return;
	is_response = c->role == ROLE_SERVER;
	w->now_ns = bpf_ktime_get_ns();
	w->thread = bpf_get_current_pid_tgid();
	if (c->tcp) {
		KERNEL_READ(write_seq, sk, tcp_sock, write_seq);
		sent_up_to(c, write_seq);
		tcp_bytes(c, is_response, w->thread, w->now_ns);
		return;
	}
	/* Too early: the kernel waits for the connection, or says that it is not there. */
	if (c->connect_start_ns && !c->connect_end_ns)
		return;
	if (!is_response && c->open && !sync_received(c, 1))
		return;
	if (!sync_sent(c, is_response, &again) || again >= size)
		return;
	w->ignore = again;	/* sent again after a partial send */
	sent_up_to(c, c->send_seq + size - again);
	w->left = size;
	if (msg)
		find_buffers(&w->buffers, msg);
	else
		__builtin_memset(&w->buffers, 0, sizeof(w->buffers));
	take(ctx, c, w, is_response);
}

int send_entry(struct pt_regs *ctx, void *sk, void *msg, u64 size)
{
	sends(ctx, sk, msg, size);
	return 0;
}

/* sendfile and splice, until 6.5 made them a tcp_sendmsg of pages (c5c37af6ecad). */
int sendpage_entry(struct pt_regs *ctx, void *sk, void *page, int offset, u64 size)
{
	sends(ctx, sk, 0, size);
	return 0;
}

int receive_entry(struct pt_regs *ctx, void *sk, void *msg, u64 size, u64 fourth, u64 fifth)
{
	u64 key = (u64)sk, thread;
	struct connection *c = connection_of(sk);
	struct receive r = {};
#if PODSPAN_KERNEL_VERSION < KERNEL_VERSION(5, 19, 0)
	u64 flags = fifth;	/* ec095263a965, 5.19, removed `nonblock` before it */
#else
	u64 flags = fourth;
#endif

	if (!c)
		return 0;
	thread = bpf_get_current_pid_tgid();
	if (flags & MSG_PEEK) {
		receives.delete(&thread);
		return 0;
	}
	r.sock = key;
	KERNEL_READ(r.from_seq, sk, tcp_sock, copied_seq);
	find_buffers(&r.buffers, msg);
	if (flags & MSG_TRUNC)
		r.buffers.readable = 0;	/* thrown away, not copied: tcp(7) */
	if (receives.update(&thread, &r))
		lose(LOSS_THREADS_FULL);
	return 0;
}

static inline void at_end_of_file(struct connection *c, void *sk)
{
	u8 shutdown = 0;

	bpf_probe_read_kernel(&shutdown, 1, sk + OFFSET(sock, sk_shutdown));
	if (!(shutdown & RCV_SHUTDOWN) || unread(sk) || !c->open || c->tcp ||
	    has_parked(c) || c->role != ROLE_CLIENT)
		return;
	if (c->scan[RESPONSE].state != SCAN_UNTIL_EOF)
		c->response_last_ns = bpf_ktime_get_ns();
	finish(c, c->scan[RESPONSE].state == SCAN_UNTIL_EOF ? END_EOF : END_CLOSED_THERE);
	c->scan[RESPONSE].state = SCAN_OPAQUE;
}

int receive_copied(struct pt_regs *ctx, void *sk, int copied)
{
	u64 key = (u64)sk, thread;
	u32 zero = 0, copied_seq = 0, seen, again;
	struct connection *c = connections.lookup(&key);
	struct walk *w = walks.lookup(&zero);
	struct receive *r;
	int is_response;
	s32 missed;

	if (!c || !w)
		return 0;
	thread = bpf_get_current_pid_tgid();
	r = receives.lookup(&thread);
	if (copied <= 0) {
		if (copied == 0)
			at_end_of_file(c, sk);
		else
			receives.delete(&thread);
		return 0;
	}
	copied_seq = copied_up_to(sk);
	is_response = c->role == ROLE_CLIENT;
	w->now_ns = bpf_ktime_get_ns();
	if (!is_response && (c->tcp || c->scan[REQUEST].state == SCAN_OPAQUE))
		serves_unknown(thread);
	if (c->tcp) {
		received_up_to(c, copied_seq);
		tcp_bytes(c, is_response, thread, w->now_ns);
		return 0;
	}
	if (!r || r->sock != key || copied_seq != r->from_seq + copied) {
		/* No tcp_recvmsg, or one that began before the agent: splice(2). */
		if (is_response && c->open)
			c->response_last_ns = w->now_ns;
		sync_received(c, is_response);
		return 0;
	}
	seen = r->seen;
	if ((u32)copied <= seen)
		return 0;
	r->seen = copied;
	missed = r->from_seq + seen - c->recv_seq;
	received_up_to(c, r->from_seq + copied);
	if (missed > 0 && !catch_up(c, is_response, missed))
		return 0;
	/* A response that no hook saw to its end has ended all the same. */
	if (c->role == ROLE_SERVER && c->open && !sync_sent(c, 1, &again))
		return 0;
	w->buffers = r->buffers;
	w->ignore = seen;
	w->left = copied;
	w->thread = thread;
	take(ctx, c, w, is_response);
	return 0;
}

static inline void advance(struct walk *w, u64 bytes)
{
	w->buffers.base += bytes;
	w->buffers.length -= bytes;
	w->left -= bytes;
}

/* If the message has ended, note it; if bytes are left, go on. */
static inline void message_done(struct pt_regs *ctx, struct connection *c,
				struct walk *w, struct scanner *s)
{
	if (s->state == SCAN_DONE) {
		if (w->is_response)
			exchange_complete(c, !w->left);
		scan_next(s);
		if (w->left && !message_begins(c, w->is_response, w->now_ns))
			return;
	}
	if (w->left) {
		bytes_steps.call(ctx, STEP_WALK);
		/* 33 tail calls are the kernel's limit: MAX_TAIL_CALL_CNT. */
		forsake(c, LOSS_PIECES);
	}
}

int bytes_walk(struct pt_regs *ctx)
{
	u32 zero = 0, at, i;
	struct walk *w = walks.lookup(&zero);
	struct scan_table *t = grammar.lookup(&zero);
	struct connection *c;
	struct scanner *s;
	struct iov segment = {};
	u64 key, n;
	u8 *text;

	if (!w || !t)
		return 0;
	key = w->key;
	c = connections.lookup(&key);
	if (!c)
		return 0;
	s = &c->scan[w->is_response & 1];
	text = (u8 *)&c->request.text;
	w->cursor = 0;
	w->limit = 0;

	for (i = 0; i < SEGMENTS; i++) {
		barrier();
		if (!w->left || s->state == SCAN_DONE)
			break;
		if (!w->buffers.readable) {
			/* Body bytes need no reading. */
			n = w->left;
		} else if (!w->buffers.length) {
			if (!w->buffers.count)
				goto unreadable;
			w->buffers.count--;
			bpf_probe_read_kernel(&segment, sizeof(segment),
					      (void *)w->buffers.vector);
			w->buffers.vector += sizeof(segment);
			w->buffers.base = segment.base;
			w->buffers.length = segment.length;
			continue;
		} else {
			n = w->buffers.length < w->left ? w->buffers.length : w->left;
		}
		if (w->ignore) {
			n = n < w->ignore ? n : w->ignore;
			w->ignore -= n;
		} else {
			n = scan_skip(s, n);
			if (!n)
				break;
			if (w->is_response)
				c->response_bytes += n;
			else
				c->request.bytes += n;
		}
		advance(w, n);
	}
	barrier();
	if (w->left && s->state < SCAN_HEAD_DONE && !w->ignore) {
		n = w->buffers.length < w->left ? w->buffers.length : w->left;
		if (!w->buffers.readable || !n) {
			if (!n && w->buffers.readable)
				goto again;
			forsake(c, LOSS_BYTES_UNREADABLE);
			return 0;
		}
		if (n > SCAN_STEP)
			n = SCAN_STEP;
		at = n;
		if (w->buffers.in_kernel ?
			    bpf_probe_read_kernel(w->piece, at, (void *)w->buffers.base) :
			    bpf_probe_read_user(w->piece, at, (void *)w->buffers.base)) {
			forsake(c, LOSS_BYTES_UNREADABLE);
			return 0;
		}
		w->limit = n;
		for (i = 0; i < SCAN_STEP; i++) {
			barrier();
			at = w->cursor;
			if (at >= w->limit || at >= SCAN_STEP ||
			    s->state >= SCAN_HEAD_DONE)
				break;
			scan_byte(t, s, text, w->piece[at]);
			w->cursor = at + 1;
		}
		barrier();
		advance(w, w->cursor);
	}
	if (s->state == SCAN_HEAD_DONE) {
		bytes_steps.call(ctx, STEP_HEAD);
	} else if (s->state == SCAN_OPAQUE) {
		if (!w->is_response)
			note_http2(c);
		forsake(c, w->is_response ? LOSS_RESPONSE_UNPARSED :
					    LOSS_REQUEST_UNPARSED);
		if (c->tcp == TCP_WANTED)
			tcp_begins(c, w->thread, w->now_ns);
	} else {
		message_done(ctx, c, w, s);
	}
	return 0;
again:
	bytes_steps.call(ctx, STEP_WALK);
	forsake(c, LOSS_PIECES);
	return 0;
unreadable:
	forsake(c, LOSS_BYTES_UNREADABLE);
	return 0;
}

/* The worker that carries this connection writes what request.c would have written. It
 * gets the head only after this, however the connection is redirected. */
static inline void hand_over(struct connection *c, u64 left)
{
	struct scanner *s = &c->scan[REQUEST];
	struct request *q = &c->request;
	struct handed_key key = {};
	struct handed given = {};

	if (!c->whole || !(what_to_do(c->netns) & POLICY_REDIRECT))
		return;
	if (!HAS(s, HEADER_REQUEST_ID)) {
		make_request_id(q, s);
		__builtin_memcpy(given.request_id, q->text.request_id,
				 sizeof(given.request_id));
	}
	given.trace_id_high = q->trace_id_high;
	given.trace_id_low = q->trace_id_low;
	given.span_id = q->span_id;
	given.parent_id = q->parent_id;
	given.link = q->link;
	given.flags = q->flags;
	tuple_of(&key.tuple, c);
	key.offset = c->sent - left;
	if (!handed.update(&key, &given))
		q->flags |= FLAG_INJECTED;
}

/* A head is complete: what it means, and what follows it. */
int bytes_head(struct pt_regs *ctx)
{
	u32 zero = 0;
	struct walk *w = walks.lookup(&zero);
	struct head_context h = {};
	struct connection *c;
	struct scanner *s;
	u64 key;

	if (!w)
		return 0;
	key = w->key;
	c = connections.lookup(&key);
	if (!c)
		return 0;
	s = &c->scan[w->is_response & 1];
	if (w->is_response) {
		response_head(c, w->left, w->thread, w->now_ns);
	} else {
		remember_thread(&c->request, w->thread);
		keep_request(c, &h);
		if (c->role == ROLE_SERVER)
			server_context(c, &h);
		else
			client_context(c, &h);
		scan_body(s, 0);
		if (c->role == ROLE_CLIENT && s->state != SCAN_OPAQUE)
			hand_over(c, w->left);
	}
	if (s->state == SCAN_OPAQUE) {
		if (!w->is_response)
			forsake(c, LOSS_REQUEST_UNPARSED);
		return 0;
	}
	message_done(ctx, c, w, s);
	return 0;
}

/* An event loop waits for its next turn: what it does then may be for anybody. A thread that
 * serves one request to its end waits with poll(2), if at all. */
int turn_ends(struct pt_regs *ctx)
{
	u64 thread = bpf_get_current_pid_tgid();
	struct serving *serving = servings.lookup(&thread);

	if (serving && !serving->multiplexed)
		servings.delete(&thread);
	return 0;
}

RAW_TRACEPOINT_PROBE(sched_process_exit)
{
	u64 thread = bpf_get_current_pid_tgid();
	u32 process = thread >> 32;

	servings.delete(&thread);
	receives.delete(&thread);
	attempts.delete(&thread);
	if ((u32)thread == process)
		roaming.delete(&process);
	return 0;
}
