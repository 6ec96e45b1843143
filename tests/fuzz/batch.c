/* batch: many streams in one call, each fed whole, cut and byte by byte.
 *
 * What a stream says is written down as encode() of fuzz/batch.py writes the reference's
 * verdict, and the two are compared here: nothing is decoded where all is well.
 */
#include "harness.c"

#define VERDICT_MAX (EVENTS_MAX * 2048)
#define STATE_IN_HEAD 255	/* the reference does not tell in which place */
#define WRONG_EVENT 255		/* equals none of the reference's */

/* Read by fuzz/batch.py. */
struct fuzz_case {
	u64 data_at, data_size;
	u64 cuts_at, cuts;		/* in and of the batch's cuts */
	u64 expected_at, expected_size;
	u64 is_response;
	u64 after_head;
};

struct fuzz_batch {
	const struct fuzz_case *cases;
	u64 count;
	const u8 *data;
	const u64 *cuts;
	const u8 *expected;
};

/* How often; by the scanner's states, the classes of bytes, the headers. */
struct fuzz_coverage {
	u64 cells[(SCAN_STATES_MASK + 1) * 32];
	u64 cuts[SCAN_STATES_MASK + 1];		/* inside a stream */
	u64 ends[SCAN_STATES_MASK + 1];		/* of streams */
	u64 heads[HEADERS_MASK + 1];		/* of requests, that have the header */
	u64 again[AGAIN_MAX + 2];		/* of requests, by B3 lines that repeat */
	u64 all_heads;
	u64 messages;
};

static const struct {
	u16 at, size;
} kept_of[HEADERS_MASK + 1] = {
#define KEPT(field) { TEXT_AT(field), TEXT_LEN(field) }
	[HEADER_HOST] = KEPT(host),
	[HEADER_USER_AGENT] = KEPT(user_agent),
	[HEADER_REQUEST_ID] = KEPT(request_id),
	[HEADER_TRACE_ID] = KEPT(trace_id),
	[HEADER_SPAN_ID] = KEPT(span_id),
	[HEADER_PARENT_ID] = KEPT(parent_id),
	[HEADER_SAMPLED] = KEPT(sampled),
	[HEADER_FLAGS] = KEPT(flags),
	[HEADER_B3] = KEPT(b3),
	[HEADER_TRACEPARENT] = KEPT(traceparent),
	[HEADER_CLIENT_TRACE_ID] = KEPT(client_trace_id),
};

static u8 verdict[VERDICT_MAX];
static u64 verdict_size;

static void put(u64 number, int size)
{
	for (; size--; number >>= 8)
		verdict[verdict_size++] = number;
}

static void put_text(const u8 *text, u64 size)
{
	__builtin_memcpy(verdict + verdict_size, text, size);
	verdict_size += size;
}

/* A text that ends where its field does, or before a NUL. */
static void put_word(const u8 *text, u64 most)
{
	u64 size = 0;

	while (size < most && text[size])
		size++;
	put(size, 2);
	put_text(text, size);
}

static int is_untouched(const struct scan_text *text)
{
	u64 i;

	for (i = 0; i < sizeof(*text); i++)
		if (((const u8 *)text)[i] != NOBODYS_TEXT)
			return 0;
	return 1;
}

static void put_head(const struct event *e, int is_response)
{
	const u8 *text = (const u8 *)&e->text;
	u64 i, size;

	put(e->head_bytes, 4);
	put(e->status, 2);
	put(e->minor, 1);
	put(e->body_state, 1);
	put(e->body_state == SCAN_BODY ? e->skip : 0, 8);
	put(e->again, 1);
	for (i = 0; i < e->again && i < AGAIN_MAX; i++)
		put(e->again_at[i], 2);
	put_word(text + TEXT_AT(method), is_response ? 0 : TEXT_LEN(method));
	put_word(text + TEXT_AT(target), is_response ? 0 : TEXT_LEN(target));
	for (i = 0; i <= HEADERS_MASK; i++) {
		if (!kept_of[i].size || !(e->seen & 1U << i))
			continue;
		put(i, 1);
		put(e->name_at_of[i], 2);
		put(e->at_of[i], 2);
		put(e->length_of[i], 2);
		size = e->length_of[i] < kept_of[i].size ? e->length_of[i] : kept_of[i].size;
		if (!is_response)
			put_text(text + kept_of[i].at, size);
	}
}

static void put_verdict(const struct stream *t)
{
	u8 state = t->scanner.state;
	u32 i;

	verdict_size = 0;
	for (i = 0; i < t->count; i++) {
		const struct event *e = &t->events[i];
		int wrong = e->kind == EVENT_HEAD && t->scanner.is_response &&
			    !is_untouched(&e->text);

		put(wrong ? WRONG_EVENT : e->kind, 1);
		put(e->at, 8);
		if (e->kind == EVENT_HEAD)
			put_head(e, t->scanner.is_response);
	}
	put(0, 1);
	put(state <= SCAN_END_LF ? STATE_IN_HEAD : state, 1);
	put(t->scanner.skip, 8);
}

static void cover_events(const struct stream *t, struct fuzz_coverage *c)
{
	u32 i, header;

	for (i = 0; i < t->count; i++) {
		const struct event *e = &t->events[i];

		c->messages += e->kind == EVENT_MESSAGE;
		if (e->kind != EVENT_HEAD)
			continue;
		c->all_heads++;
		if (t->scanner.is_response)
			continue;
		for (header = 0; header <= HEADERS_MASK; header++)
			c->heads[header] += e->seen >> header & 1;
		c->again[e->again <= AGAIN_MAX ? e->again : AGAIN_MAX + 1]++;
	}
}

static void feed_bytes_covering(struct stream *t, const u8 *data, u64 size,
				struct fuzz_coverage *c)
{
	u64 i;
	u8 state;

	for (i = 0; i < size; i++) {
		state = t->scanner.state;
		if (state < SCAN_HEAD_DONE)
			c->cells[state * 32 + grammar->table.classes[data[i]]]++;
		feed(t, data + i, 1);
	}
}

static void feed_cut_covering(struct stream *t, const u8 *data, u64 size,
			      const u64 *cuts, u64 count, struct fuzz_coverage *c)
{
	u64 from = 0, i;

	for (i = 0; i < count; i++) {
		feed(t, data + from, cuts[i] - from);
		from = cuts[i];
		if (from < size)
			c->cuts[t->scanner.state]++;
	}
	feed(t, data + from, size - from);
}

static int differs(const struct fuzz_batch *b, const struct fuzz_case *f,
		   const struct grammar *of, struct fuzz_coverage *c)
{
	static struct stream whole, other;
	const u8 *data = b->data + f->data_at;

	open_stream(&whole, of, f->is_response, f->after_head);
	feed(&whole, data, f->data_size);
	put_verdict(&whole);
	if (verdict_size != f->expected_size ||
	    __builtin_memcmp(verdict, b->expected + f->expected_at, verdict_size))
		return 1;

	open_stream(&other, of, f->is_response, f->after_head);
	feed_cut_covering(&other, data, f->data_size, b->cuts + f->cuts_at, f->cuts, c);
	if (__builtin_memcmp(&whole, &other, sizeof(whole)))
		return 1;

	open_stream(&other, of, f->is_response, f->after_head);
	feed_bytes_covering(&other, data, f->data_size, c);
	c->ends[whole.scanner.state]++;
	cover_events(&whole, c);
	return __builtin_memcmp(&whole, &other, sizeof(whole)) != 0;
}

/* The number of the first case that differs, or `count`. */
u64 first_difference(const struct fuzz_batch *b, const struct grammar *of,
		     struct fuzz_coverage *c)
{
	u64 i;

	for (i = 0; i < b->count; i++)
		if (differs(b, &b->cases[i], of, c))
			break;
	return i;
}
