/* harness: bpf/scanner.h and bpf/b3.h for the tests, fed as bpf/bytes.c feeds them.
 *
 * Built as a shared object, called through ctypes by native/scanner.py. Types are those
 * that the BPF programs have: bpf/headers/include/linux/kconfig.h.
 */
#include <linux/kconfig.h>
#include "scanner.h"
#include "b3.h"

#define NAMES_MAX 16
#define EVENTS_MAX 64
#define NOBODYS_TEXT 0xa5	/* a request's text, while its response passes */

enum event_kind {
	EVENT_HEAD = 1,
	EVENT_MESSAGE,
	EVENT_OPAQUE,
};

/* Read by ctypes: widest first, no hidden padding. */
struct event {
	u64 at;			/* bytes of the stream taken so far */
	u64 skip;		/* after scan_body() */
	u32 kind;
	u32 seen;
	u32 head_bytes;
	u16 status;
	u8 minor;
	u8 body_state;		/* after scan_body() */
	u16 length_of[HEADERS_MASK + 1];
	u16 at_of[HEADERS_MASK + 1];
	u16 name_at_of[HEADERS_MASK + 1];
	u16 again_at[AGAIN_MAX];
	u8 again;
	u8 reserved[7];
	struct scan_text text;
};

struct grammar {
	struct scan_table table;
	struct scan_name names[NAMES_MAX];
	struct scan_entry entries[NAMES_MAX];
};

struct stream {
	struct scanner scanner;
	struct scan_text text;
	u64 at;
	u32 count;		/* of events */
	u8 request_was_head;
	struct event events[EVENTS_MAX];
};

static const struct grammar *grammar;

static inline struct scan_entry *scan_lookup(struct scan_name *name)
{
	int i;

	for (i = 0; i < NAMES_MAX; i++)
		if (grammar->names[i].text[0] &&
		    !__builtin_memcmp(&grammar->names[i], name, sizeof(*name)))
			return (struct scan_entry *)&grammar->entries[i];
	return NULL;
}

static struct event *note(struct stream *t, enum event_kind kind)
{
	struct event *e = &t->events[t->count < EVENTS_MAX - 1 ? t->count++ : t->count];
	struct scanner *s = &t->scanner;

	e->kind = kind;
	e->at = t->at;
	if (kind != EVENT_HEAD)
		return e;
	e->seen = s->seen;
	e->head_bytes = s->head_bytes;
	e->status = s->status;
	e->minor = s->minor;
	__builtin_memcpy(e->length_of, s->length_of, sizeof(e->length_of));
	__builtin_memcpy(e->at_of, s->at_of, sizeof(e->at_of));
	__builtin_memcpy(e->name_at_of, s->name_at_of, sizeof(e->name_at_of));
	__builtin_memcpy(e->again_at, s->again_at, sizeof(e->again_at));
	e->again = s->again;
	e->text = t->text;
	return e;
}

static void begin(struct stream *t)
{
	int untouched = t->scanner.is_response ? NOBODYS_TEXT : 0;

	scan_next(&t->scanner);
	__builtin_memset(&t->text, untouched, sizeof(t->text));
}

static void head_done(struct stream *t)
{
	struct event *e = note(t, EVENT_HEAD);
	struct scanner *s = &t->scanner;
	u16 status = s->status;
	int bodiless = s->is_response &&
		       (t->request_was_head || status == 204 || status == 304 ||
			(status >= 100 && status <= 199));

	scan_body(s, bodiless);
	e->body_state = s->state;
	e->skip = s->skip;
}

/* One send or read. Not inlined: nothing but the stream outlives it. */
__attribute__((noinline)) void feed(struct stream *t, const u8 *piece, u64 size)
{
	struct scanner *s = &t->scanner;
	u64 at = 0, n;

	while (at < size && s->state != SCAN_OPAQUE) {
		n = scan_skip(s, size - at);
		at += n;
		t->at += n;
		while (at < size && s->state < SCAN_HEAD_DONE) {
			scan_byte(&grammar->table, s, (u8 *)&t->text, piece[at++]);
			t->at++;
		}
		if (s->state == SCAN_HEAD_DONE)
			head_done(t);
		if (s->state == SCAN_OPAQUE)
			note(t, EVENT_OPAQUE);
		if (s->state == SCAN_DONE) {
			note(t, EVENT_MESSAGE);
			begin(t);
		}
	}
}

void open_stream(struct stream *t, const struct grammar *of, int is_response,
		 int request_was_head)
{
	__builtin_memset(t, 0, sizeof(*t));
	grammar = of;
	t->request_was_head = request_was_head;
	t->scanner.is_response = is_response;
	begin(t);
}

/* Feed `data` cut before each of `cuts`, which ascend. */
void feed_cut(struct stream *t, const u8 *data, u64 size, const u64 *cuts, u64 count)
{
	u64 from = 0, i;

	for (i = 0; i < count; i++) {
		feed(t, data + from, cuts[i] - from);
		from = cuts[i];
	}
	feed(t, data + from, size - from);
}

void feed_bytes(struct stream *t, const u8 *data, u64 size)
{
	u64 i;

	for (i = 0; i < size; i++)
		feed(t, data + i, 1);
}

/* Cut `data` in two at each of its bytes, `step` apart; returns the first cut that
 * leaves a stream other than `whole`, or 0. */
u64 differing_cut(const struct stream *whole, const u8 *data, u64 size, u64 step)
{
	static struct stream t;
	u64 cut;

	for (cut = 1; cut < size; cut += step) {
		open_stream(&t, grammar, whole->scanner.is_response,
			    whole->request_was_head);
		feed(&t, data, cut);
		feed(&t, data + cut, size - cut);
		if (__builtin_memcmp(&t, whole, sizeof(t)))
			return cut;
	}
	return 0;
}

u64 stream_size(void)
{
	return sizeof(struct stream);
}

u32 state_of(const struct stream *t)
{
	return t->scanner.state;
}

u64 skip_of(const struct stream *t)
{
	return t->scanner.skip;
}

u32 count_of(const struct stream *t)
{
	return t->count;
}

const struct event *events_of(const struct stream *t)
{
	return t->events;
}

void b3_hex_write(u8 *to, u64 value)
{
	hex_write(to, value);
}

u64 b3_hex_read(const u8 *from, u32 *bad)
{
	return hex_read(from, bad);
}

void b3_uuid_write(u8 *to, u64 high, u64 low, u8 reason)
{
	uuid_write(to, high, low, reason);
}

u64 b3_derive_id(u64 id)
{
	return derive_id(id);
}

u32 b3_sample_hash(u64 trace_id_low)
{
	return sample_hash(trace_id_low);
}

/* What the request head at the start of `data` carries; 0 where there is no head. */
int b3_read_context(struct head_context *x, const struct grammar *of, const u8 *data,
		    u64 size)
{
	static struct stream t;
	u64 i;

	open_stream(&t, of, 0, 0);
	for (i = 0; i < size && t.scanner.state < SCAN_HEAD_DONE; i++)
		scan_byte(&grammar->table, &t.scanner, (u8 *)&t.text, data[i]);
	if (t.scanner.state != SCAN_HEAD_DONE)
		return 0;
	read_context(x, &t.text, &t.scanner);
	return 1;
}
