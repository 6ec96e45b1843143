/* request: the requests that traced pods send, and the headers written into them.
 *
 * Hook:  sk_msg on the sockhash of enrolled client sockets; tcp_sendmsg is not called
 *        for them. Chain of tail calls: entry -> scan (itself again) -> inject.
 * Cost:  some ten instructions per head byte, none per body byte.
 * Runs under the socket's lock, preemptible: no per-CPU state.
 */
#define STEP_SCAN 0
#define STEP_INJECT 1

/* The text of what is inserted, filled by the agent: agent/kernel/program.py. */
struct template {
	u8 request_id[56];	/* "x-request-id: ________-____-4___-____-____________\r\n" */
	u8 trace_id[48];
	u8 span_id[32];
	u8 parent_id[40];
	u8 sampled[24];
};
BPF_ARRAY(templates, struct template, 1);
BPF_PROG_ARRAY(request_steps, 2);

#define LINE_REQUEST_ID 52
#define LINE_TRACE_ID 48
#define LINE_SPAN_ID 31
#define LINE_PARENT_ID 37
#define LINE_SAMPLED 17

#define HEAD_END_MAX 0x7fff	/* in the message: what precedes a head is moved with it */
#define INSERT_MAX 192	/* all lines together, rounded up */

#define INSERT_REQUEST_ID 1
#define INSERT_TRACE_ID 2
#define INSERT_SPAN_ID 4
#define INSERT_PARENT_ID 8
#define INSERT_SAMPLED 16

static inline struct connection *connection_of(struct sk_msg_md *msg)
{
	u64 key = (u64)msg->sk;

	return connections.lookup(&key);
}

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

/* Positions are TCP sequence numbers, as in bytes.c: when a push fails half-way, the
 * application sends the rest again, and tcp_bpf_send_verdict does not run the program on
 * the next message at all (psock->eval stays set; seen on 6.1). */
int request_entry(struct sk_msg_md *msg)
{
	struct connection *c = connection_of(msg);
	u32 size = msg->size, seen = 0;
	u64 skipped;

	if (!c || !size || !sync_sent(c, 0, &seen) || seen >= size)
		return SK_PASS;
	c->send_seq += size - seen;
	if (!message_begins(c, 0, bpf_ktime_get_ns()))
		return SK_PASS;
	skipped = scan_skip(&c->scan[REQUEST], size - seen);
	c->request_bytes += skipped;
	c->message_at = seen + skipped;
	request_goes_on(msg, c, size);
	return SK_PASS;
}

int request_scan(struct sk_msg_md *msg)
{
	struct connection *c = connection_of(msg);
	struct scanner *s;
	u8 *data, *end, *p, *text;
	u32 start, size, at, i, zero = 0;
	struct scan_table *t = grammar.lookup(&zero);
	u64 skipped;

	if (!c || !t)
		return SK_PASS;
	s = &c->scan[REQUEST];
	text = (u8 *)&c->text;
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
		forsake(c, LOSS_REQUEST_UNPARSED);
		return SK_PASS;
	}
	if (start > size)
		return SK_PASS;
	skipped = scan_skip(s, size - start);
	c->request_bytes += skipped;
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

int request_inject(struct sk_msg_md *msg)
{
	struct connection *c = connection_of(msg);
	u32 zero = 0, head_end, at, length, offset = 0, size;
	struct template *t = templates.lookup(&zero);
	struct scanner *s;
	u8 *data, *end, *p;
	u8 insert;
	s64 span_at, parent_at, where;
	int found;

	if (!c || !t)
		return SK_PASS;
	s = &c->scan[REQUEST];
	scan_body(s, 0);
	if (s->state == SCAN_OPAQUE) {
		forsake(c, LOSS_REQUEST_UNPARSED);
		return SK_PASS;
	}
	remember_thread(c, bpf_get_current_pid_tgid());
	found = client_context(c);
	head_end = c->message_at;	/* one past the head, in this message */
	at = head_end - 2;
	size = msg->size;

	if (found == CONTEXT_MALFORMED) {
		lose(LOSS_INJECT_MALFORMED);
		goto done;
	}
	if (head_end < 2 || s->head_bytes < 2) {
		lose(LOSS_INJECT_CUT);
		goto done;
	}
	if (!room_to_send((void *)c->sock, head_end + INSERT_MAX)) {
		lose(LOSS_INJECT_BUFFER);
		goto done;
	}

	/* Where forwarded values begin: negative in a message that has passed. */
	span_at = (s64)head_end - s->head_bytes + s->at_of[HEADER_SPAN_ID];
	parent_at = (s64)head_end - s->head_bytes + s->at_of[HEADER_PARENT_ID];
	insert = HAS(s, HEADER_REQUEST_ID) ? 0 : INSERT_REQUEST_ID;
	/* B3: debug implies accept, and is not sent along with it. */
	if (!HAS(s, HEADER_SAMPLED) && !(c->flags & FLAG_ACCEPTED_DEBUG))
		insert |= INSERT_SAMPLED;
	if (found == CONTEXT_VALID) {
		if (span_at < 0 || (HAS(s, HEADER_PARENT_ID) && parent_at < 0)) {
			lose(LOSS_INJECT_CUT);
			goto done;
		}
		if (!HAS(s, HEADER_PARENT_ID))
			insert |= INSERT_PARENT_ID;
		else if (s->length_of[HEADER_PARENT_ID] != 16) {
			lose(LOSS_INJECT_MALFORMED);
			goto done;
		}
	} else {
		insert |= INSERT_TRACE_ID | INSERT_SPAN_ID;
		if (c->parent_id)
			insert |= INSERT_PARENT_ID;
	}

	/* Into one piece, and that the first: bpf_msg_push_data puts bytes at the wrong
	 * place in others (`rsge.offset`, mended in 2026). */
	if (head_end > HEAD_END_MAX || bpf_msg_pull_data(msg, 0, head_end, 0)) {
		lose(LOSS_INJECT_MEMORY);
		goto done;
	}
	if (found == CONTEXT_VALID) {
		data = (u8 *)(long)msg->data;
		end = (u8 *)(long)msg->data_end;
		where = span_at & HEAD_END_MAX;
		p = data + where;
		if (p + 16 > end) {
			lose(LOSS_INJECT_CUT);
			goto done;
		}
		hex_write(p, c->span_id);
		if (HAS(s, HEADER_PARENT_ID)) {
			/* Cannot fail: the head was scanned in this range. */
			where = parent_at & HEAD_END_MAX;
			p = data + where;
			if (p + 16 <= end)
				hex_write(p, c->parent_id);
		}
		c->flags |= FLAG_INJECTED;
	}

	length = (insert & INSERT_REQUEST_ID ? LINE_REQUEST_ID : 0) +
		 (insert & INSERT_TRACE_ID ? LINE_TRACE_ID : 0) +
		 (insert & INSERT_SPAN_ID ? LINE_SPAN_ID : 0) +
		 (insert & INSERT_PARENT_ID ? LINE_PARENT_ID : 0) +
		 (insert & INSERT_SAMPLED ? LINE_SAMPLED : 0);
	if (!length)
		goto done;
	if (bpf_msg_push_data(msg, at, length, 0)) {
		lose(LOSS_INJECT_MEMORY);
		goto done;
	}
	if (bpf_msg_pull_data(msg, at, at + length, 0))
		goto undo;
	data = (u8 *)(long)msg->data;
	end = (u8 *)(long)msg->data_end;
	if (insert & INSERT_REQUEST_ID) {
		p = data + offset;
		if (p + LINE_REQUEST_ID > end)
			goto undo;
		if (!c->request_id_length) {
			uuid_write(c->text.request_id, random64(), random64(), '4');
			c->request_id_length = 36;
		}
		__builtin_memcpy(p, t->request_id, LINE_REQUEST_ID);
		__builtin_memcpy(p + 14, c->text.request_id, 36);
		offset += LINE_REQUEST_ID;
	}
	if (insert & INSERT_TRACE_ID) {
		p = data + offset;
		if (p + LINE_TRACE_ID > end)
			goto undo;
		__builtin_memcpy(p, t->trace_id, LINE_TRACE_ID);
		hex_write(p + 14, c->trace_id_high);
		hex_write(p + 30, c->trace_id_low);
		offset += LINE_TRACE_ID;
	}
	if (insert & INSERT_SPAN_ID) {
		p = data + offset;
		if (p + LINE_SPAN_ID > end)
			goto undo;
		__builtin_memcpy(p, t->span_id, LINE_SPAN_ID);
		hex_write(p + 13, c->span_id);
		offset += LINE_SPAN_ID;
	}
	if (insert & INSERT_PARENT_ID) {
		p = data + offset;
		if (p + LINE_PARENT_ID > end)
			goto undo;
		__builtin_memcpy(p, t->parent_id, LINE_PARENT_ID);
		hex_write(p + 19, c->parent_id);
		offset += LINE_PARENT_ID;
	}
	if (insert & INSERT_SAMPLED) {
		p = data + offset;
		if (p + LINE_SAMPLED > end)
			goto undo;
		__builtin_memcpy(p, t->sampled, LINE_SAMPLED);
		p[14] = c->flags & FLAG_SAMPLED ? '1' : '0';
		offset += LINE_SAMPLED;
	}
	c->flags |= FLAG_INJECTED;
	c->message_at = head_end + length;
	c->send_seq += length;
	size += length;
	/* One piece again: tcp_bpf_push sends each on its own, and a peer may then read
	 * half a head (before 6.5 nearly always, seen on 6.12 as well). Failing costs that. */
	bpf_msg_pull_data(msg, 0, head_end + length, 0);
	goto done;
undo:
	lose(LOSS_INJECT_MEMORY);
	if (bpf_msg_pop_data(msg, at, length, 0)) {
		lose(LOSS_INJECT_DROPPED);
		return SK_DROP;
	}
done:
	at = c->message_at;
	if (at < size) {
		u64 skipped = scan_skip(s, size - at);

		c->request_bytes += skipped;
		c->message_at = at + skipped;
	}
	request_goes_on(msg, c, size);
	return SK_PASS;
}
