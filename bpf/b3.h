/* b3: the trace context in a request's head, ids to numbers and back.
 *
 * Pure; compiled natively by the tests against agent/context.py and agent/ids.py.
 * Source: openzipkin/b3-propagation, README; W3C Trace Context level 1 section 3.2.
 *
 * Hardly a branch, for the verifier follows each: in BPF a comparison is one, and the
 * compiler makes others of arithmetic that it sees through.
 */
#ifndef PODSPAN_B3_H
#define PODSPAN_B3_H

#include "scanner.h"

#define TEXT8(a, b, c, d, e, f, g, h)                                                  \
	((u64)(a) | (u64)(b) << 8 | (u64)(c) << 16 | (u64)(d) << 24 | (u64)(e) << 32 | \
	 (u64)(f) << 40 | (u64)(g) << 48 | (u64)(h) << 56)

static inline u8 hex_digit(u8 nibble)
{
	return nibble + '0' + (((nibble + 6) >> 4) & 1) * 39;
}

/* Without branches: sixteen of these in a row would be 3^16 paths to the verifier. */
static inline u32 hex_value(u8 c, u32 *bad)
{
	u32 no_digit = (u32)((c - '0') | ('9' - c)) >> 31;
	u32 no_letter = (u32)((c - 'a') | ('f' - c)) >> 31;

	*bad |= no_digit & no_letter;
	return (c & 15) + 9 * no_digit;
}

static inline void hex_write(u8 *to, u64 value)
{
	int i;

#pragma clang loop unroll(full)
	for (i = 0; i < 16; i++)
		to[i] = hex_digit((value >> (60 - 4 * i)) & 15);
}

/* 36 chars of a random UUID, variant 10: RFC 9562 section 5.4. In place of the version
 * stands Envoy's trace reason: '4' (the version) none, '9' sampled, 'a' forced, 'b' by
 * the client. */
static inline void uuid_write(u8 *to, u64 high, u64 low, u8 reason)
{
	int i;

	low = (low & ~(3ULL << 62)) | 2ULL << 62;
#pragma clang loop unroll(disable)
	for (i = 0; i < 16; i++) {
		to[i + (i >= 8) + (i >= 12)] = hex_digit((high >> (60 - 4 * i)) & 15);
		to[19 + i + (i >= 4)] = hex_digit((low >> (60 - 4 * i)) & 15);
	}
	to[8] = '-';
	to[13] = '-';
	to[14] = reason;
	to[18] = '-';
	to[23] = '-';
}

/* 16 lower-case digits to a number; `bad` becomes 1 where they are not that. */
static inline u64 hex_read(const u8 *from, u32 *bad)
{
	u64 value = 0;
	int i;

#pragma clang loop unroll(disable)
	for (i = 0; i < 16; i++)
		value = value << 4 | (hex_value(from[i], bad) & 15);
	return value;
}

static inline u32 hex_read_byte(const u8 *from, u32 *bad)
{
	return hex_value(from[0], bad) << 4 | (hex_value(from[1], bad) & 15);
}

/* A server's span id, from that of its client: never the same, and never 0. Distinct
 * ids stay distinct: each step can be undone, and the lowest bit changes, which no step
 * before lets depend on the others. The one id that would become 0 takes what 0 would
 * become. */
static inline u64 derive_id(u64 id)
{
	id *= 0x9e3779b97f4a7c15ULL;
	id ^= id >> 32 & ~1ULL;
	id *= 0xd6e8feb86659fd93ULL;
	id ^= 1;
	return id ? id : 1;
}

/* The same 32 bits wherever the trace passes, to sample it or not: MurmurHash3's
 * finalizer. */
static inline u32 sample_hash(u64 trace_id_low)
{
	u64 hash = trace_id_low;

	hash ^= hash >> 33;
	hash *= 0xff51afd7ed558ccdULL;
	hash ^= hash >> 33;
	hash *= 0xc4ceb9fe1a85ec53ULL;
	return hash >> 32;
}

enum decision {
	DECISION_NONE,
	DECISION_DENY,
	DECISION_ACCEPT,
	DECISION_DEBUG,		/* wins over both: the bits of both */
};

struct head_context {
	u64 trace_id_high;	/* ids: all 0 unless has_ids */
	u64 trace_id_low;
	u64 span_id;
	u64 parent_id;		/* 0: none, or not known */
	u8 has_ids;
	u8 decision;		/* of B3, else of traceparent */
	u8 forced;		/* to be sampled where `decision` is none */
	u8 malformed;		/* a B3 header is: nothing is taken from any header */
	u8 b3_ids;		/* the header b3 is valid and has ids; then: */
	u8 b3_long;		/* its trace id has 32 digits, not 16 */
	u8 b3_decided;		/* it has a decision */
	u8 b3_parent;		/* and a place for the parent, perhaps of none */
	u8 traceparent;		/* it is valid, whether or not it counts */
	u8 reserved[7];
};
_Static_assert(sizeof(struct head_context) == 48, "padding");

/* 0 where `a` is 0, else 1. */
static inline u64 nonzero(u64 a)
{
	u64 minus = -a;

	scan_forget(minus);
	return (a | minus) >> 63;
}

static inline u64 same(u64 a, u64 b)
{
	return nonzero(a ^ b) ^ 1;
}

/* All bits where `flag` is 1, none where it is 0. */
static inline u64 where(u64 flag)
{
	u64 bits = -flag;

	scan_forget(bits);
	return bits;
}

static inline u64 has_header(const struct scanner *s, u8 header)
{
	return s->seen >> header & 1;
}

/* The value of 8 kept bytes and of this length is `word`, of `size` bytes. Kept bytes
 * may go on with spaces that are not the value's. */
static inline u64 is_word(const u8 *kept, u16 length, u64 word, u16 size)
{
	u64 text = *(const u64 *)kept;

	return same((text ^ word) << (64 - 8 * size), 0) & same(length, size);
}

static inline u64 decision_of(u64 deny, u64 accept, u64 debug)
{
	return DECISION_DENY * deny | DECISION_ACCEPT * accept | DECISION_DEBUG * debug;
}

/* `digits`, 16 or 32 of them, and the ids beside them; a parent that is none as 0.
 * Returns 1 where they are malformed, as the next two. */
static inline u32 read_ids(struct head_context *x, const u8 *digits, u32 is_long,
			   const u8 *span, const u8 *parent, u64 has_parent)
{
	u32 bad = 0, bad_parent = 0, low_at = is_long * 16;

	scan_forget(low_at);
	x->has_ids = 1;
	x->trace_id_high = hex_read(digits, &bad) & where(is_long);
	x->trace_id_low = hex_read(digits + (low_at & 16), &bad);
	x->span_id = hex_read(span, &bad);
	x->parent_id = hex_read(parent, &bad_parent) & where(has_parent);
	x->parent_id &= where(nonzero(x->parent_id ^ x->span_id));
	bad |= bad_parent & has_parent;
	bad |= same(x->trace_id_high | x->trace_id_low, 0) | same(x->span_id, 0);
	return bad;
}

static inline u32 read_multi(struct head_context *x, const struct scan_text *t,
			     const struct scanner *s)
{
	u16 length = s->length_of[HEADER_SAMPLED];
	u64 deny, accept, debug, has_parent;
	u32 bad;

	deny = is_word(t->sampled, length, '0', 1) |
	       is_word(t->sampled, length, TEXT8('f', 'a', 'l', 's', 'e', 0, 0, 0), 5);
	accept = is_word(t->sampled, length, '1', 1) |
		 is_word(t->sampled, length, TEXT8('t', 'r', 'u', 'e', 0, 0, 0, 0), 4);
	debug = is_word(t->flags, s->length_of[HEADER_FLAGS], '1', 1);
	x->decision = decision_of(deny, accept, debug);
	bad = has_header(s, HEADER_SAMPLED) ^ (deny | accept);

	/* Empty is tolerated: Envoy (PR 6263) broke traces when it was not. */
	length = s->length_of[HEADER_PARENT_ID];
	has_parent = nonzero(length);
	if (!(s->seen & (1U << HEADER_TRACE_ID | 1U << HEADER_SPAN_ID)))
		return bad | has_parent;
	bad |= has_parent & nonzero(length ^ 16);
	bad |= nonzero(s->length_of[HEADER_SPAN_ID] ^ 16);
	length = s->length_of[HEADER_TRACE_ID];
	bad |= nonzero(length ^ 16) & nonzero(length ^ 32);
	return bad | read_ids(x, t->trace_id, nonzero(length ^ 16), t->span_id,
			      t->parent_id, has_parent);
}

/* TRACE-SPAN[-DECISION[-PARENT]], or DECISION. */
static inline u32 read_single(struct head_context *x, const struct scan_text *t,
			      const struct scanner *s)
{
	u16 length = s->length_of[HEADER_B3];
	u64 is_long = nonzero(t->b3[16] ^ '-'), decided, has_parent;
	u32 more = is_long * 16, left, bad;
	const u8 *b3 = t->b3;
	u8 c = b3[0];

	if (length == 1) {
		x->decision = decision_of(same(c, '0'), same(c, '1'), same(c, 'd'));
		return same(x->decision, DECISION_NONE);
	}
	/* From here on as if the trace id had 16 digits. */
	left = length - 33 - more;
	scan_forget(more);
	b3 += more & 16;
	decided = nonzero(left);
	has_parent = decided & nonzero(left ^ 2);
	c = b3[34];
	/* None where the value ends before it. */
	x->decision = decision_of(same(c, '0'), same(c, '1'), same(c, 'd'));
	x->b3_ids = 1;
	x->b3_long = is_long;
	x->b3_decided = decided;
	x->b3_parent = has_parent;
	bad = has_parent & nonzero(left ^ 19);
	bad |= nonzero(b3[16] ^ '-');
	bad |= decided & (nonzero(b3[33] ^ '-') | same(x->decision, DECISION_NONE));
	bad |= has_parent & nonzero(b3[35] ^ '-');
	return bad | read_ids(x, t->b3, is_long, b3 + 17, b3 + 36, has_parent);
}

/* VERSION-TRACE-PARENT-FLAGS, 55 characters; later versions may go on after a dash. */
static inline void read_traceparent(struct head_context *x, const struct scan_text *t,
				    const struct scanner *s)
{
	const u8 *text = t->traceparent;
	u64 high, low, span, other_length, taken;
	u32 bad = 0, version, flags;

	version = hex_read_byte(text, &bad);
	high = hex_read(text + 3, &bad);
	low = hex_read(text + 19, &bad);
	span = hex_read(text + 36, &bad);
	flags = hex_read_byte(text + 53, &bad);
	bad |= nonzero((text[2] ^ '-') | (text[35] ^ '-') | (text[52] ^ '-'));
	bad |= same(version, 0xff) | same(high | low, 0) | same(span, 0);
	/* A shorter one has no dash there. */
	other_length = nonzero(s->length_of[HEADER_TRACEPARENT] ^ 55);
	bad |= other_length & (same(version, 0) | nonzero(text[55] ^ '-'));

	x->traceparent = bad ^ 1;
	taken = x->traceparent & ((x->has_ids | x->malformed) ^ 1);
	x->has_ids |= taken;
	x->trace_id_high |= high & where(taken);
	x->trace_id_low |= low & where(taken);
	x->span_id |= span & where(taken);
	taken &= same(x->decision, DECISION_NONE);
	x->decision |= decision_of((flags & 1) ^ 1, flags & 1, 0) & where(taken);
}

/* Of a head that is complete, whose text was zero before it. B3's single header beats
 * its others wholly, and its ids beat traceparent's. Of a repeated header the first
 * counts. */
static inline void read_context(struct head_context *x, const struct scan_text *t,
				const struct scanner *s)
{
	u8 reason = t->request_id[14];
	u64 keep;
	u32 bad;

	__builtin_memset(x, 0, sizeof(*x));
	if (has_header(s, HEADER_B3))
		bad = read_single(x, t, s);
	else
		bad = read_multi(x, t, s);
	keep = where(bad ^ 1);
	x->trace_id_high &= keep;
	x->trace_id_low &= keep;
	x->span_id &= keep;
	x->parent_id &= keep;
	x->has_ids &= keep;
	x->decision &= keep;
	x->b3_ids &= keep;
	x->b3_long &= keep;
	x->b3_decided &= keep;
	x->b3_parent &= keep;
	x->malformed = bad;
	if (has_header(s, HEADER_TRACEPARENT))
		read_traceparent(x, t, s);
	/* Envoy's trace reason, as in uuid_write(); it too looks at no more of the UUID. */
	x->forced = has_header(s, HEADER_CLIENT_TRACE_ID) |
		    (same(s->length_of[HEADER_REQUEST_ID], 36) &
		     (same(reason, '9') | same(reason, 'a') | same(reason, 'b')));
}

#endif
