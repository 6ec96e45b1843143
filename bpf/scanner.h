/* scanner: what an HTTP/1 byte stream says, one byte at a time.
 *
 * One scanner per direction of a connection. All it knows lies in struct scanner, so
 * the verdict does not depend on how sends and reads cut the bytes. The grammar is a
 * table, made by agent/kernel/grammar.py: state and byte give the next state and an
 * action. So the verifier follows some thirty short ways per byte, not hundreds.
 * Pure: compiled natively by the tests, which compare it with agent/http_head.py.
 *
 * What a server could read in two ways (bare LF, folded lines, space before the colon,
 * two framings) is refused: the connection is opaque from there on, its bytes pass
 * untouched.
 */
#ifndef PODSPAN_SCANNER_H
#define PODSPAN_SCANNER_H

#define HEAD_MAX 16384
#define METHOD_MAX 16
#define LENGTH_DIGITS_MAX 18	/* of a u64's 20: no overflow */
#define CHUNK_DIGITS_MAX 15

enum scan_state {
	SCAN_START,		/* before a request */
	SCAN_START_LF,		/* an empty line before it: RFC 9112 section 2.2 */
	SCAN_METHOD,
	SCAN_TARGET_FIRST,
	SCAN_TARGET,
	SCAN_REQUEST_VERSION,	/* expects H, then TTP/1. in the states that follow */
	SCAN_REQUEST_VERSION_1,
	SCAN_REQUEST_VERSION_2,
	SCAN_REQUEST_VERSION_3,
	SCAN_REQUEST_VERSION_4,
	SCAN_REQUEST_VERSION_5,
	SCAN_REQUEST_VERSION_6,
	SCAN_REQUEST_MINOR,
	SCAN_REQUEST_CR,
	SCAN_RESPONSE,		/* before a response; the same for it */
	SCAN_RESPONSE_1,
	SCAN_RESPONSE_2,
	SCAN_RESPONSE_3,
	SCAN_RESPONSE_4,
	SCAN_RESPONSE_5,
	SCAN_RESPONSE_6,
	SCAN_RESPONSE_MINOR,
	SCAN_RESPONSE_SP,
	SCAN_STATUS_1,
	SCAN_STATUS_2,
	SCAN_STATUS_3,
	SCAN_STATUS_END,
	SCAN_REASON,
	SCAN_LINE_LF,
	SCAN_NAME_FIRST,
	SCAN_NAME,
	SCAN_OWS,
	SCAN_VALUE,
	SCAN_LENGTH_OWS,	/* Content-Length */
	SCAN_LENGTH,
	SCAN_LENGTH_END,
	SCAN_CODING_OWS,	/* Transfer-Encoding, which has to be "chunked" */
	SCAN_CODING_1,
	SCAN_CODING_2,
	SCAN_CODING_3,
	SCAN_CODING_4,
	SCAN_CODING_5,
	SCAN_CODING_6,
	SCAN_CODING_7,
	SCAN_CODING_OTHER,
	SCAN_END_LF,
	SCAN_CHUNK_FIRST,
	SCAN_CHUNK_SIZE,
	SCAN_CHUNK_EXTENSION,
	SCAN_CHUNK_LF,
	SCAN_CHUNK_CR,
	SCAN_CHUNK_DATA_LF,
	SCAN_TRAILER_FIRST,
	SCAN_TRAILER,
	SCAN_TRAILER_LF,
	SCAN_TRAILERS_LF,
	/* From here on no byte is looked at. */
	SCAN_HEAD_DONE,		/* the caller reads the head, then calls scan_body() */
	SCAN_BODY,		/* `skip` bytes, then the message is done */
	SCAN_CHUNK_DATA,	/* `skip` bytes, then the next chunk */
	SCAN_DONE,		/* the caller calls scan_next() */
	SCAN_UNTIL_EOF,		/* a response whose body ends with the connection */
	SCAN_OPAQUE,		/* not HTTP/1, or not provably so */
	SCAN_STATES,
};
_Static_assert(SCAN_STATES <= 64, "masked by SCAN_STATES_MASK");
#define SCAN_STATES_MASK 63

enum scan_action {
	ACT_NOTHING,
	ACT_VALUE_BYTE,
	ACT_VALUE_SPACE,
	ACT_VALUE_FIRST,
	ACT_VALUE_ENDS,
	ACT_NAME_BYTE,
	ACT_NAME_FIRST,
	ACT_NAME_ENDS,
	ACT_METHOD_FIRST,
	ACT_METHOD_BYTE,
	ACT_TARGET_FIRST,
	ACT_MINOR,
	ACT_STATUS,
	ACT_LENGTH_FIRST,
	ACT_LENGTH_DIGIT,
	ACT_LENGTH_ENDS,
	ACT_CHUNKED,
	ACT_OTHER_CODING,
	ACT_CHUNK_FIRST,
	ACT_CHUNK_DIGIT,
	ACT_CHUNK_BEGINS,
	ACT_FORGET_LINE,
};

enum scan_header {
	HEADER_OTHER,
	HEADER_HOST,
	HEADER_USER_AGENT,
	HEADER_REQUEST_ID,
	HEADER_TRACE_ID,
	HEADER_SPAN_ID,
	HEADER_PARENT_ID,
	HEADER_SAMPLED,
	HEADER_FLAGS,
	HEADER_B3,
	HEADER_TRACEPARENT,
	HEADER_CLIENT_TRACE_ID,
	HEADER_LENGTH,
	HEADER_CODING,
};
#define HEADERS_MASK 15
#define AGAIN_MAX 4
/* Of which headers further lines have to be hidden: of those that are written. */
#if PROPAGATE_TRACECONTEXT
#define LAST_HIDDEN HEADER_TRACEPARENT
#else
#define LAST_HIDDEN HEADER_B3
#endif

/* The texts of a request that are kept; longer ones are cut. */
struct scan_text {
	u8 method[METHOD_MAX];
	u8 target[256];
	u8 host[96];
	u8 user_agent[96];
	u8 request_id[40];
	u8 client_trace_id[40];
	/* So far the record takes them: bpf/exchange.h. */
	u8 trace_id[32];
	u8 span_id[16];
	u8 parent_id[16];
	u8 sampled[8];
	u8 flags[8];
	u8 b3[72];
	u8 traceparent[56];
	u8 unused[272];
};
#define TEXT_SIZE 1024
_Static_assert(sizeof(struct scan_text) == TEXT_SIZE, "masked by TEXT_SIZE - 1");
#define TEXT_AT(field) __builtin_offsetof(struct scan_text, field)
#define TEXT_LEN(field) sizeof(((struct scan_text *)0)->field)

/* agent/kernel/grammar.py fills these. */
struct scan_cell {
	u8 state;
	u8 action;
};

struct scan_table {
	struct scan_cell cells[64 * 32];	/* state * 32 + class of the byte */
	u8 classes[256];
	u8 lower[256];
};

struct scan_name {
	u8 text[24];		/* lower case, NUL after its end */
};

struct scan_entry {
	u16 capture_at;		/* in struct scan_text */
	u16 capture_left;	/* 0: not kept */
	u8 header;
	u8 state;		/* that reads the value */
	u8 repeats;		/* each value counts; else the first wins, as B3 says */
	u8 reserved;
};

struct scanner {
	u64 skip;		/* body bytes to pass without a look */
	u64 length;		/* of Content-Length, or of the chunk */
	u64 first_length;	/* Content-Length so far, plus one */
	struct scan_name name;
	u32 head_bytes;
	u32 seen;		/* bit per enum scan_header */
	u16 value_bytes;	/* of the value so far, or digits of a number */
	u16 value_length;	/* of the value without trailing space */
	u16 value_at;		/* in the head */
	u16 capture_at;
	u16 capture_left;
	u16 status;
	u16 length_of[HEADERS_MASK + 1];	/* of each header's value, uncut */
	u16 at_of[HEADERS_MASK + 1];		/* its place in the head; 0 where it is empty */
	u16 name_at_of[HEADERS_MASK + 1];	/* that of its name */
	u16 again_at[AGAIN_MAX];		/* names of their further lines, of requests */
	u8 state;
	u8 is_response;
	u8 header;		/* whose value is passing */
	u8 name_length;
	u8 chunked;		/* 1: chunked, 2: something else */
	u8 minor;
	u8 again;		/* how many of them; more than AGAIN_MAX have no place */
	u8 reserved[5];
};

/* What the includer knows of a header's name, or NULL. */
static inline struct scan_entry *scan_lookup(struct scan_name *name);

#define scan_forget(number) asm volatile("" : "+r"(number))

static inline void scan_keep(struct scanner *s, u8 *text, u8 c)
{
	u16 at = s->capture_at, left = s->capture_left;

	s->value_bytes++;
	if (left) {
		text[at & (TEXT_SIZE - 1)] = c;
		s->capture_at = at + 1;
		s->capture_left = left - 1;
	}
}

static inline void scan_value_begins(struct scanner *s, u16 at, u16 left)
{
	s->capture_at = at;
	s->capture_left = left;
	s->value_bytes = 0;
	s->value_length = 0;
	s->value_at = 0;
	s->length = 0;
}

static inline void scan_name_ends(struct scanner *s)
{
	struct scan_entry *entry = scan_lookup(&s->name);

	/* The colon has been counted. */
	u16 name_at = s->head_bytes - 1 - s->name_length;
	u8 header, again;

	s->header = HEADER_OTHER;
	scan_value_begins(s, 0, 0);
	if (!entry)
		return;
	header = entry->header & HEADERS_MASK;
	if (!entry->repeats && s->seen & (1U << header)) {
		again = s->again;
		if (s->is_response || header < HEADER_TRACE_ID || header > LAST_HIDDEN)
			return;
		if (again < AGAIN_MAX)
			s->again_at[again & (AGAIN_MAX - 1)] = name_at;
		if (again < 255)
			s->again = again + 1;
		return;
	}
	s->header = header;
	s->name_at_of[header] = name_at;
	s->state = entry->state;
	if (!s->is_response)
		scan_value_begins(s, entry->capture_at, entry->capture_left);
}

static inline void scan_value_ends(struct scanner *s)
{
	u8 header = s->header & HEADERS_MASK;

	s->seen |= 1U << header;
	s->length_of[header] = s->value_length;
	s->at_of[header] = s->value_at;
}

/* Take one byte of a head, of a chunk's size, or of a trailer. */
static inline void scan_byte(const struct scan_table *t, struct scanner *s, u8 *text, u8 c)
{
	u8 before = s->state;
	u32 index = (before & SCAN_STATES_MASK) * 32 + (t->classes[c] & 31);
	const struct scan_cell *cell;
	u8 action, at;
	u64 length;

	/* 6.1's verifier loses the bounds that the compiler knows, and masks away. */
	scan_forget(index);
	cell = &t->cells[index & (64 * 32 - 1)];
	action = cell->action;
	s->state = cell->state;
	if (++s->head_bytes > HEAD_MAX && before <= SCAN_END_LF) {
		s->state = SCAN_OPAQUE;
		return;
	}
	if (action == ACT_NOTHING)
		return;
	if (action <= ACT_VALUE_FIRST) {
		if (action == ACT_VALUE_FIRST)
			s->value_at = s->head_bytes - 1;
		scan_keep(s, text, c);
		if (action != ACT_VALUE_SPACE)
			s->value_length = s->value_bytes;
	} else if (action == ACT_VALUE_ENDS) {
		scan_value_ends(s);
	} else if (action <= ACT_NAME_FIRST) {
		if (action == ACT_NAME_FIRST) {
			__builtin_memset(&s->name, 0, sizeof(s->name));
			s->name_length = 0;
		}
		/* A name that fills all 24 bytes equals none of the table's. */
		at = s->name_length;
		if (at < sizeof(s->name.text)) {
			s->name.text[at] = t->lower[c];
			s->name_length = at + 1;
		}
	} else if (action == ACT_NAME_ENDS) {
		scan_name_ends(s);
	} else if (action <= ACT_TARGET_FIRST) {
		if (action == ACT_METHOD_FIRST)
			scan_value_begins(s, TEXT_AT(method), TEXT_LEN(method));
		if (action == ACT_TARGET_FIRST)
			scan_value_begins(s, TEXT_AT(target), TEXT_LEN(target));
		if (!s->capture_left)
			s->state = SCAN_OPAQUE;
		scan_keep(s, text, c);
	} else if (action <= ACT_STATUS) {
		if (action == ACT_MINOR)
			s->minor = c - '0';
		else
			s->status = s->status * 10 + (c - '0');
	} else if (action <= ACT_LENGTH_DIGIT) {
		s->length = s->length * 10 + (c - '0');
		if (++s->value_bytes > LENGTH_DIGITS_MAX)
			s->state = SCAN_OPAQUE;
	} else if (action == ACT_LENGTH_ENDS) {
		length = s->length + 1;
		if (s->first_length && s->first_length != length)
			s->state = SCAN_OPAQUE;
		s->first_length = length;
		s->seen |= 1U << HEADER_LENGTH;
	} else if (action == ACT_CHUNKED) {
		s->chunked = s->chunked ? 2 : 1;
	} else if (action == ACT_OTHER_CODING) {
		s->chunked = 2;
	} else if (action <= ACT_CHUNK_DIGIT) {
		if (action == ACT_CHUNK_FIRST) {
			s->length = 0;
			s->value_bytes = 0;
		}
		/* '0'..'9' are 0x30.., 'A' and 'a' 0x41 and 0x61 */
		s->length = s->length << 4 | ((c & 15) + 9 * (c >> 6));
		if (++s->value_bytes > CHUNK_DIGITS_MAX)
			s->state = SCAN_OPAQUE;
	} else if (action == ACT_CHUNK_BEGINS) {
		length = s->length;
		s->skip = length;
		if (!length)
			s->state = SCAN_TRAILER_FIRST;
	} else {
		s->head_bytes = 0;
	}
}

/* Pass up to `available` body bytes; returns how many were body. */
static inline u64 scan_skip(struct scanner *s, u64 available)
{
	u64 skip = s->skip;
	u8 state = s->state;

	if (state == SCAN_UNTIL_EOF || state == SCAN_OPAQUE)
		return available;
	if (state != SCAN_BODY && state != SCAN_CHUNK_DATA)
		return 0;
	if (skip > available)
		skip = available;
	s->skip -= skip;
	if (!s->skip)
		s->state = state == SCAN_BODY ? SCAN_DONE : SCAN_CHUNK_CR;
	return skip;
}

/* After SCAN_HEAD_DONE: what follows the head. RFC 9112 section 6.3.
 * `bodiless`: a response to HEAD, or 204, 304. */
static inline void scan_body(struct scanner *s, int bodiless)
{
	u64 length = s->first_length;
	u8 chunked = s->chunked, is_response = s->is_response;

	s->skip = 0;
	if (bodiless) {
		s->state = SCAN_DONE;
	} else if (chunked == 1 && (is_response || !length)) {
		s->state = SCAN_CHUNK_FIRST;
	} else if (chunked) {
		/* Two framings, or an unknown coding: where it ends is anybody's guess. */
		s->state = is_response ? SCAN_UNTIL_EOF : SCAN_OPAQUE;
	} else if (length > 1) {
		s->skip = length - 1;
		s->state = SCAN_BODY;
	} else if (length == 1 || !is_response) {
		s->state = SCAN_DONE;
	} else {
		s->state = SCAN_UNTIL_EOF;
	}
}

/* After SCAN_DONE, and before all: forget the message, wait for the next. */
static inline void scan_next(struct scanner *s)
{
	u8 is_response = s->is_response;

	__builtin_memset(s, 0, sizeof(*s));
	s->is_response = is_response;
	s->state = is_response ? SCAN_RESPONSE : SCAN_START;
}

#endif
