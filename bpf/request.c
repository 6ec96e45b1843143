/* request: the requests that traced pods send, and the headers written into them.
 *
 * Hook:  sk_msg on the sockhash of enrolled client sockets; tcp_sendmsg is not called
 *        for them. Chain of tail calls: entry -> scan (itself again) -> inject -> insert.
 * Cost:  some ten instructions per head byte, none per body byte.
 * Runs under the socket's lock, preemptible: no per-CPU state.
 */
#define STEP_SCAN 0
#define STEP_INJECT 1
#define STEP_INSERT 2

/* The text of what is inserted, filled by the agent: agent/kernel/tracer.py. */
struct template {
	u8 request_id[56];	/* "x-request-id: ________-____-4___-____-____________\r\n" */
	u8 trace_id[48];
	u8 short_trace_id[32];
	u8 span_id[32];
	u8 parent_id[40];
	u8 sampled[24];
	u8 flags[16];
	u8 b3[80];		/* with 32 digits, a decision and a parent */
	u8 traceparent[72];
};
BPF_ARRAY(templates, struct template, 1);
BPF_PROG_ARRAY(request_steps, 3);

#define LINE_REQUEST_ID 52
#define LINE_TRACE_ID 48
#define LINE_SHORT_TRACE_ID 32
#define LINE_SPAN_ID 31
#define LINE_PARENT_ID 37
#define LINE_SAMPLED 17
#define LINE_FLAGS 15
#define LINE_B3_IDS 53		/* "b3: ", trace id, "-", span id */
#define LINE_B3_DECISION 2	/* "-1" */
#define LINE_B3_PARENT 17
#define LINE_TRACEPARENT 70
#define TRACEPARENT_AT 13	/* its value in the line */
#define TRACEPARENT_LENGTH 55

#define HEAD_END_MAX 0x7fff	/* in the message: what precedes a head is moved with it */
#define INSERT_MAX 384	/* all lines together, rounded up */

#define INSERT_REQUEST_ID 1
#define INSERT_TRACE_ID 2
#define INSERT_SHORT_TRACE_ID 4
#define INSERT_SPAN_ID 8
#define INSERT_PARENT_ID 16
#define INSERT_SAMPLED 32
#define INSERT_FLAGS 64
#define INSERT_B3 128
#define INSERT_B3_DECISION 256
#define INSERT_B3_PARENT 512
#define INSERT_TRACEPARENT 1024

#define BIT(number) (1U << (number))

/* Parts of struct connection's b3_form. */
#define B3_LONG 1
#define B3_DECIDED 2
#define B3_PARENT 4

#define HEX_TRACE_ID 0		/* in struct connection's hex */
#define HEX_SPAN_ID 32
#define HEX_PARENT_ID 48

/* If the message has ended, note it; if bytes are left, scan them. */
static inline void request_goes_on(struct sk_msg_md *msg, struct connection *c, u32 size)
{
	struct scanner *s = &c->scan[REQUEST];

	if (s->state == SCAN_DONE) {
		scan_next(s);
		if (c->message_at < size && !message_begins(c, 0, bpf_ktime_get_ns()))
			return;
	}
	if (c->message_at < size) {
		request_steps.call(msg, STEP_SCAN);
		/* 33 tail calls are the kernel's limit: MAX_TAIL_CALL_CNT. */
		forsake(c, LOSS_PIECES);
	}
}

static inline struct connection *known(struct sk_msg_md *msg)
{
	u64 key = (u64)msg->sk;

	return connections.lookup(&key);
}

/* Positions are TCP sequence numbers, as in bytes.c: when a push fails half-way, the
 * application sends the rest again, and tcp_bpf_send_verdict does not run the program on
 * the next message at all (psock->eval stays set; seen on 6.1). */
int request_entry(struct sk_msg_md *msg)
{
	struct connection *c = known(msg);
	void *pointer = msg->sk, *sk = 0;
	u32 size = msg->size, seen = 0, write_seq = 0;
	u64 skipped, now;

	if (!c) {
		/* As in lifecycle.c: read back, it is a number. */
		bpf_probe_read_kernel(&sk, sizeof(sk), &pointer);
		c = adopt(sk);
	}
	if (!c || !size)
		return SK_PASS;
	c->enrolled = 1;
	now = bpf_ktime_get_ns();
	if (c->tcp) {
		KERNEL_READ(write_seq, (void *)c->sock, tcp_sock, write_seq);
		sent_up_to(c, write_seq);
		tcp_bytes(c, 0, bpf_get_current_pid_tgid(), now);
		return SK_PASS;
	}
	if (c->open && !sync_received(c, 1))
		return SK_PASS;
	if (!sync_sent(c, 0, &seen) || seen >= size)
		return SK_PASS;
	sent_up_to(c, c->send_seq + size - seen);
	if (!message_begins(c, 0, now))
		return SK_PASS;
	skipped = scan_skip(&c->scan[REQUEST], size - seen);
	c->request.bytes += skipped;
	c->message_at = seen + skipped;
	request_goes_on(msg, c, size);
	return SK_PASS;
}

int request_scan(struct sk_msg_md *msg)
{
	struct connection *c = known(msg);
	struct scanner *s;
	u8 *data, *end, *p, *text;
	u32 start, size, at, i, zero = 0;
	struct scan_table *t = grammar.lookup(&zero);
	u64 skipped;

	if (!c || !t)
		return SK_PASS;
	s = &c->scan[REQUEST];
	text = (u8 *)&c->request.text;
	start = c->message_at;
	size = msg->size;
	if (start >= size)
		return SK_PASS;
	/* Copies nothing where the bytes lie in one piece that is not shared. */
	at = start + SCAN_STEP;
	if (bpf_msg_pull_data(msg, start, at < size ? at : size, 0)) {
		forsake(c, LOSS_BYTES_UNREADABLE);
		return SK_PASS;
	}
	data = (u8 *)(long)msg->data;
	end = (u8 *)(long)msg->data_end;
	c->cursor = 0;
	for (i = 0; i < SCAN_STEP; i++) {
		barrier();
		if (s->state >= SCAN_HEAD_DONE)
			break;
		at = c->cursor;
		if (at > 0xfff)
			break;
		p = data + at;
		if (p + 1 > end)
			break;
		scan_byte(t, s, text, *p);
		c->cursor = at + 1;
	}
	barrier();
	start += c->cursor;
	c->message_at = start;
	if (s->state == SCAN_HEAD_DONE) {
		request_steps.call(msg, STEP_INJECT);
		forsake(c, LOSS_PIECES);
		return SK_PASS;
	}
	if (s->state == SCAN_OPAQUE) {
		note_http2(c);
		forsake(c, LOSS_REQUEST_UNPARSED);
		if (c->tcp == TCP_WANTED)
			tcp_begins(c, bpf_get_current_pid_tgid(), bpf_ktime_get_ns());
		return SK_PASS;
	}
	if (start > size)
		return SK_PASS;
	skipped = scan_skip(s, size - start);
	c->request.bytes += skipped;
	c->message_at = start + skipped;
	request_goes_on(msg, c, size);
	return SK_PASS;
}

static inline int room_to_send(void *sk, u32 bytes)
{
	s32 queued = 0, limit = 0;

	KERNEL_READ(queued, sk, sock, sk_wmem_queued);
	KERNEL_READ(limit, sk, sock, sk_sndbuf);
	return limit - queued > (s32)(2 * bytes + 4096);
}

/* In the map, where the verifier does not follow which bits are set. */
#define INSERT(line, size)                                                             \
	do {                                                                           \
		c->insert |= (line);                                                   \
		c->insert_length += (size);                                            \
		barrier();                                                             \
	} while (0)
#define WRITE(header)                                                                  \
	do {                                                                           \
		c->write |= BIT(header);                                               \
		barrier();                                                             \
	} while (0)
#define HIDE(header)                                                                   \
	do {                                                                           \
		c->hide |= BIT(header);                                                \
		barrier();                                                             \
	} while (0)

/* Who sends one form of B3 is answered in that form too: half of it, or an old one, would
 * travel on otherwise. */
#define MULTI_HEADERS                                                                  \
	(BIT(HEADER_TRACE_ID) | BIT(HEADER_SPAN_ID) | BIT(HEADER_PARENT_ID) |          \
	 BIT(HEADER_SAMPLED) | BIT(HEADER_FLAGS))
#define WANTS_MULTI(s) (PROPAGATE_B3MULTI || (s)->seen & MULTI_HEADERS)
#define WANTS_SINGLE(s) (PROPAGATE_B3 || HAS(s, HEADER_B3))

/* The ids of the multi headers. A value of the right size is written over; any other line
 * is hidden, and a new one inserted. */
static inline void plan_ids(struct connection *c, struct scanner *s, int as_they_are)
{
	struct request *q = &c->request;
	u16 length = s->length_of[HEADER_TRACE_ID];
	int fits = length == 32 || (length == 16 && !q->trace_id_high);

	if (as_they_are) {
		/* The trace id is the one adopted. */
	} else if (HAS(s, HEADER_TRACE_ID) && fits) {
		WRITE(HEADER_TRACE_ID);
	} else {
		if (HAS(s, HEADER_TRACE_ID))
			HIDE(HEADER_TRACE_ID);
		if (!WANTS_MULTI(s))
			;
		else if (q->trace_id_high)
			INSERT(INSERT_TRACE_ID, LINE_TRACE_ID);
		else
			INSERT(INSERT_SHORT_TRACE_ID, LINE_SHORT_TRACE_ID);
	}
	if (HAS(s, HEADER_SPAN_ID) && s->length_of[HEADER_SPAN_ID] == 16) {
		WRITE(HEADER_SPAN_ID);
	} else {
		if (HAS(s, HEADER_SPAN_ID))
			HIDE(HEADER_SPAN_ID);
		if (WANTS_MULTI(s))
			INSERT(INSERT_SPAN_ID, LINE_SPAN_ID);
	}
	if (q->parent_id && HAS(s, HEADER_PARENT_ID) &&
	    s->length_of[HEADER_PARENT_ID] == 16) {
		WRITE(HEADER_PARENT_ID);
	} else {
		if (HAS(s, HEADER_PARENT_ID))
			HIDE(HEADER_PARENT_ID);
		if (q->parent_id && WANTS_MULTI(s))
			INSERT(INSERT_PARENT_ID, LINE_PARENT_ID);
	}
}

/* B3: debug implies accept, which is then not sent along. What the caller wrote stays where
 * it means the same. */
static inline void plan_decision(struct connection *c, struct scanner *s, int told)
{
	struct request *q = &c->request;
	u8 debug = q->flags & FLAG_ACCEPTED_DEBUG;
	u8 sampled = q->flags & FLAG_SAMPLED ? '1' : '0';
	u8 debug_digit = debug ? '1' : '0';

	if (told && HAS(s, HEADER_SAMPLED) && s->length_of[HEADER_SAMPLED] == 1) {
		if (q->text.sampled[0] != sampled)
			WRITE(HEADER_SAMPLED);
	} else {
		if (HAS(s, HEADER_SAMPLED))
			HIDE(HEADER_SAMPLED);
		if (WANTS_MULTI(s) && !debug && told)
			INSERT(INSERT_SAMPLED, LINE_SAMPLED);
	}
	if (HAS(s, HEADER_FLAGS) && s->length_of[HEADER_FLAGS] == 1) {
		if (q->text.flags[0] != debug_digit)
			WRITE(HEADER_FLAGS);
	} else {
		if (HAS(s, HEADER_FLAGS))
			HIDE(HEADER_FLAGS);
		if (WANTS_MULTI(s) && debug)
			INSERT(INSERT_FLAGS, LINE_FLAGS);
	}
}

/* The headers that hold the whole context in one value. */
static inline void plan_singles(struct connection *c, struct scanner *s,
				struct head_context *h, int told)
{
	struct request *q = &c->request;

	c->b3_form = (h->b3_long ? B3_LONG : 0) | (h->b3_decided ? B3_DECIDED : 0) |
		     (h->b3_parent ? B3_PARENT : 0);
	barrier();
	/* Without a place for it, the decision would be made again behind us. */
	if (HAS(s, HEADER_B3) && h->b3_ids && (h->b3_decided || !told)) {
		WRITE(HEADER_B3);
	} else {
		if (HAS(s, HEADER_B3))
			HIDE(HEADER_B3);
		if (WANTS_SINGLE(s)) {
			INSERT(INSERT_B3, LINE_B3_IDS + 2);
			if (told)
				INSERT(INSERT_B3_DECISION, LINE_B3_DECISION);
			if (told && q->parent_id)
				INSERT(INSERT_B3_PARENT, LINE_B3_PARENT);
		}
	}
	if (!PROPAGATE_TRACECONTEXT)
		return;
	if (HAS(s, HEADER_TRACEPARENT) &&
	    s->length_of[HEADER_TRACEPARENT] == TRACEPARENT_LENGTH) {
		WRITE(HEADER_TRACEPARENT);
	} else {
		if (HAS(s, HEADER_TRACEPARENT))
			HIDE(HEADER_TRACEPARENT);
		INSERT(INSERT_TRACEPARENT, LINE_TRACEPARENT);
	}
}

/* Whether all that has to be written over lies in this message, not in an earlier one
 * that has left. `passed` bytes of the head have. */
static inline int within_reach(struct connection *c, struct scanner *s, u32 passed)
{
	u32 i, first = HEAD_MAX, at;

	for (i = HEADER_TRACE_ID; i <= HEADER_TRACEPARENT; i++) {
		barrier();
		if (!((c->write | c->hide) & BIT(i)))
			continue;
		at = c->hide & BIT(i) ? s->name_at_of[i & HEADERS_MASK] :
					s->at_of[i & HEADERS_MASK];
		if (at < first)
			first = at;
	}
	for (i = 0; i < AGAIN_MAX; i++) {
		barrier();
		if (i < s->again && s->again_at[i & (AGAIN_MAX - 1)] < first)
			first = s->again_at[i & (AGAIN_MAX - 1)];
	}
	return first >= passed;
}

/* Go on behind the head, which ends at c->message_at. */
static inline void behind_head(struct sk_msg_md *msg, struct connection *c)
{
	u32 at = c->message_at, size = msg->size;
	u64 skipped;

	if (at < size) {
		skipped = scan_skip(&c->scan[REQUEST], size - at);
		c->request.bytes += skipped;
		c->message_at = at + skipped;
	}
	request_goes_on(msg, c, size);
}

/* A request's head has been seen: its context, and what has to be written. */
int request_inject(struct sk_msg_md *msg)
{
	struct connection *c = known(msg);
	struct head_context h = {};
	struct scanner *s;
	struct request *q;
	u32 head_end;
	int told;

	if (!c)
		return SK_PASS;
	s = &c->scan[REQUEST];
	q = &c->request;
	scan_body(s, 0);
	if (s->state == SCAN_OPAQUE) {
		c->heads = 1;
		forsake(c, LOSS_REQUEST_UNPARSED);
		return SK_PASS;
	}
	remember_thread(q, bpf_get_current_pid_tgid());
	keep_request(c, &h);
	client_context(c, &h);
	head_end = c->message_at;	/* one past the head, in this message */

	c->write = 0;
	c->hide = 0;
	c->insert = 0;
	c->insert_length = 0;
	barrier();
	if (!HAS(s, HEADER_REQUEST_ID))
		INSERT(INSERT_REQUEST_ID, LINE_REQUEST_ID);
	/* Deferring is our own decision's; the caller's is passed on. */
	told = !UNSAMPLED_DEFER || h.decision || q->flags & FLAG_SAMPLED;
	/* The single header beats these ids, also where it has none itself. */
	plan_ids(c, s, h.has_ids && !HAS(s, HEADER_B3) && HAS(s, HEADER_TRACE_ID));
	plan_decision(c, s, told);
	plan_singles(c, s, &h, told);

	if (c->old) {
		lose(LOSS_INJECT_OLD);
	} else if (s->again > AGAIN_MAX) {
		lose(LOSS_INJECT_REPEATED);
	} else if (head_end < 2 || s->head_bytes < 2 ||
		   (head_end < s->head_bytes &&
		    !within_reach(c, s, s->head_bytes - head_end))) {
		lose(LOSS_INJECT_CUT);
	} else if (!room_to_send((void *)c->sock, head_end + INSERT_MAX)) {
		lose(LOSS_INJECT_BUFFER);
	} else if (head_end > HEAD_END_MAX) {
		lose(LOSS_INJECT_MEMORY);
	} else {
		request_steps.call(msg, STEP_INSERT);
		forsake(c, LOSS_PIECES);
		return SK_PASS;
	}
	behind_head(msg, c);
	return SK_PASS;
}

static inline void prepare_texts(struct connection *c)
{
	struct request *q = &c->request;

	hex_write(c->hex + HEX_TRACE_ID, q->trace_id_high);
	hex_write(c->hex + HEX_TRACE_ID + 16, q->trace_id_low);
	hex_write(c->hex + HEX_SPAN_ID, q->span_id);
	hex_write(c->hex + HEX_PARENT_ID, q->parent_id);
	if (c->insert & INSERT_REQUEST_ID)
		make_request_id(q, &c->scan[REQUEST]);
}

#define LINE_OR(failed, size)                                                          \
	do {                                                                           \
		at = c->cursor & HEAD_END_MAX;                                         \
		p = data + at;                                                         \
		if (p + (size) > end)                                                  \
			goto failed;                                                   \
		c->cursor = at + (size);                                               \
	} while (0)

/* A packet's bytes are not aligned; clang would copy them one by one. */
static inline void copy(u8 *to, const u8 *from, u32 size)
{
	u32 i;

#pragma clang loop unroll(full)
	for (i = 0; i + 8 <= size; i += 8)
		*(u64 *)(to + i) = *(u64 *)(from + i);
#pragma clang loop unroll(full)
	for (; i < size; i++)
		to[i] = from[i];
}

/* Where a header's value, or name, lies in the message: checked for `size` bytes. */
#define PLACE_OR(failed, position, size)                                               \
	do {                                                                           \
		at = (head_end + (position) - s->head_bytes) & HEAD_END_MAX;         \
		p = data + at;                                                         \
		if (p + (size) > end)                                                  \
			goto failed;                                                   \
	} while (0)

int request_insert(struct sk_msg_md *msg)
{
	struct connection *c = known(msg);
	u32 zero = 0, head_end, at, length, i;
	struct template *t = templates.lookup(&zero);
	struct scanner *s;
	struct request *q;
	u8 *data, *end, *p, *hex;
	u8 sampled, debug;

	if (!c || !t)
		return SK_PASS;
	s = &c->scan[REQUEST];
	q = &c->request;
	hex = c->hex;
	head_end = c->message_at;
	length = c->insert_length;
	if (head_end < 2 || head_end > HEAD_END_MAX || length > INSERT_MAX)
		return SK_PASS;
	debug = q->flags & FLAG_ACCEPTED_DEBUG;
	sampled = q->flags & FLAG_SAMPLED ? '1' : '0';

	/* Into one piece, and that the first: bpf_msg_push_data puts bytes at the wrong
	 * place in others (`rsge.offset`, mended in 2026). */
	if (bpf_msg_pull_data(msg, 0, head_end, 0) ||
	    (length && bpf_msg_push_data(msg, head_end - 2, length, 0))) {
		lose(LOSS_INJECT_MEMORY);
		behind_head(msg, c);
		return SK_PASS;
	}
	/* One piece again: tcp_bpf_push sends each on its own, and a peer may then read
	 * half a head (before 6.5 nearly always, seen on 6.12 as well). */
	if (length && bpf_msg_pull_data(msg, 0, head_end + length, 0))
		goto undo;
	data = (u8 *)(long)msg->data;
	end = (u8 *)(long)msg->data_end;
	prepare_texts(c);
	c->cursor = head_end - 2;
	barrier();
	if (c->insert & INSERT_REQUEST_ID) {
		LINE_OR(undo, LINE_REQUEST_ID);
		copy(p, t->request_id, LINE_REQUEST_ID);
		copy(p + 14, q->text.request_id, 36);
	}
	barrier();
	if (c->insert & INSERT_TRACE_ID) {
		LINE_OR(undo, LINE_TRACE_ID);
		copy(p, t->trace_id, LINE_TRACE_ID);
		copy(p + 14, hex + HEX_TRACE_ID, 32);
	}
	barrier();
	if (c->insert & INSERT_SHORT_TRACE_ID) {
		LINE_OR(undo, LINE_SHORT_TRACE_ID);
		copy(p, t->short_trace_id, LINE_SHORT_TRACE_ID);
		copy(p + 14, hex + HEX_TRACE_ID + 16, 16);
	}
	barrier();
	if (c->insert & INSERT_SPAN_ID) {
		LINE_OR(undo, LINE_SPAN_ID);
		copy(p, t->span_id, LINE_SPAN_ID);
		copy(p + 13, hex + HEX_SPAN_ID, 16);
	}
	barrier();
	if (c->insert & INSERT_PARENT_ID) {
		LINE_OR(undo, LINE_PARENT_ID);
		copy(p, t->parent_id, LINE_PARENT_ID);
		copy(p + 19, hex + HEX_PARENT_ID, 16);
	}
	barrier();
	if (c->insert & INSERT_SAMPLED) {
		LINE_OR(undo, LINE_SAMPLED);
		copy(p, t->sampled, LINE_SAMPLED);
		p[14] = sampled;
	}
	barrier();
	if (c->insert & INSERT_FLAGS) {
		LINE_OR(undo, LINE_FLAGS);
		copy(p, t->flags, LINE_FLAGS);
	}
	barrier();
	if (c->insert & INSERT_B3) {
		LINE_OR(undo, LINE_B3_IDS);
		copy(p, t->b3, LINE_B3_IDS);
		copy(p + 4, hex + HEX_TRACE_ID, 32);
		copy(p + 37, hex + HEX_SPAN_ID, 16);
		barrier();
		if (c->insert & INSERT_B3_DECISION) {
			LINE_OR(undo, LINE_B3_DECISION);
			p[0] = '-';
			p[1] = debug ? 'd' : sampled;
		}
		barrier();
		if (c->insert & INSERT_B3_PARENT) {
			LINE_OR(undo, LINE_B3_PARENT);
			p[0] = '-';
			copy(p + 1, hex + HEX_PARENT_ID, 16);
		}
		barrier();
		LINE_OR(undo, 2);
		p[0] = '\r';
		p[1] = '\n';
	}
	barrier();
	if (c->insert & INSERT_TRACEPARENT) {
		LINE_OR(undo, LINE_TRACEPARENT);
		copy(p, t->traceparent, LINE_TRACEPARENT);
		copy(p + 16, hex + HEX_TRACE_ID, 32);
		copy(p + 49, hex + HEX_SPAN_ID, 16);
		p[67] = sampled;
	}
	barrier();

	/* The head was scanned where these are, so none of the places can be missed. */
	if (c->write & BIT(HEADER_TRACE_ID)) {
		if (s->length_of[HEADER_TRACE_ID] == 32) {
			PLACE_OR(written, s->at_of[HEADER_TRACE_ID], 32);
			copy(p, hex + HEX_TRACE_ID, 32);
		} else {
			PLACE_OR(written, s->at_of[HEADER_TRACE_ID], 16);
			copy(p, hex + HEX_TRACE_ID + 16, 16);
		}
	}
	barrier();
	if (c->write & BIT(HEADER_SPAN_ID)) {
		PLACE_OR(written, s->at_of[HEADER_SPAN_ID], 16);
		copy(p, hex + HEX_SPAN_ID, 16);
	}
	barrier();
	if (c->write & BIT(HEADER_PARENT_ID)) {
		PLACE_OR(written, s->at_of[HEADER_PARENT_ID], 16);
		copy(p, hex + HEX_PARENT_ID, 16);
	}
	barrier();
	if (c->write & BIT(HEADER_SAMPLED)) {
		PLACE_OR(written, s->at_of[HEADER_SAMPLED], 1);
		p[0] = sampled;
	}
	barrier();
	if (c->write & BIT(HEADER_FLAGS)) {
		PLACE_OR(written, s->at_of[HEADER_FLAGS], 1);
		p[0] = debug ? '1' : '0';
	}
	barrier();
	if (c->write & BIT(HEADER_B3)) {
		c->cursor = s->at_of[HEADER_B3];
		barrier();
		if (c->b3_form & B3_LONG) {
			PLACE_OR(written, c->cursor, 32);
			copy(p, hex + HEX_TRACE_ID, 32);
			c->cursor += 33;
		} else {
			PLACE_OR(written, c->cursor, 16);
			copy(p, hex + HEX_TRACE_ID + 16, 16);
			c->cursor += 17;
		}
		barrier();
		PLACE_OR(written, c->cursor, 16);
		copy(p, hex + HEX_SPAN_ID, 16);
		if (c->b3_form & B3_DECIDED) {
			PLACE_OR(written, c->cursor + 17, 1);
			p[0] = debug ? 'd' : sampled;
		}
		barrier();
		if (c->b3_form & B3_PARENT) {
			PLACE_OR(written, c->cursor + 19, 16);
			copy(p, hex + HEX_PARENT_ID, 16);
		}
	}
	barrier();
	if (c->write & BIT(HEADER_TRACEPARENT)) {
		/* All of it: W3C section 3.2.4 wants the version that we know, 3.2.2.5
		 * no other flag. */
		PLACE_OR(written, s->at_of[HEADER_TRACEPARENT], TRACEPARENT_LENGTH);
		copy(p, t->traceparent + TRACEPARENT_AT, TRACEPARENT_LENGTH);
		copy(p + 3, hex + HEX_TRACE_ID, 32);
		copy(p + 36, hex + HEX_SPAN_ID, 16);
		p[54] = sampled;
	}
	for (i = HEADER_TRACE_ID; i <= HEADER_TRACEPARENT; i++) {
		barrier();
		if (!(c->hide & BIT(i)))
			continue;
		/* x-b3-... becomes x-no-..., b3 no, traceparent noaceparent. */
		at = s->name_at_of[i & HEADERS_MASK] + (i < HEADER_B3 ? 2 : 0);
		PLACE_OR(written, at, 2);
		p[0] = 'n';
		p[1] = 'o';
	}
	for (i = 0; i < AGAIN_MAX; i++) {
		barrier();
		if (i >= s->again)
			break;
		PLACE_OR(written, s->again_at[i & (AGAIN_MAX - 1)], 4);
		if (p[0] == 'x' || p[0] == 'X')
			p += 2;
		p[0] = 'n';
		p[1] = 'o';
	}
written:
	q->flags |= FLAG_INJECTED;
	c->message_at = head_end + length;
	sent_up_to(c, c->send_seq + length);
	behind_head(msg, c);
	return SK_PASS;
undo:
	lose(LOSS_INJECT_MEMORY);
	if (c->insert & INSERT_REQUEST_ID)
		q->text.request_id[0] = 0;
	if (length && bpf_msg_pop_data(msg, head_end - 2, length, 0)) {
		lose(LOSS_INJECT_DROPPED);
		return SK_DROP;
	}
	behind_head(msg, c);
	return SK_PASS;
}
