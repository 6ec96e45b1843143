/* context: the trace context of an exchange, from its head, its thread, or anew.
 *
 * Order as Envoy's (ISTIO.md section 2): the B3 headers of the request's own head; else
 * what the sending thread serves; else a new root.
 */
#ifndef PODSPAN_CONTEXT_H
#define PODSPAN_CONTEXT_H

#include "b3.h"
#include "connection.h"

#define HAS(scanner, header) ((scanner)->seen & (1U << (header)))

enum head_context {
	CONTEXT_ABSENT,
	CONTEXT_VALID,
	CONTEXT_MALFORMED,
};

static inline u64 random64(void)
{
	u64 value = (u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32();

	return value ? value : 1;
}

/* Read the context that the head carries into trace_id, span_id, parent_id, flags. */
static inline int read_head_context(struct connection *c)
{
	struct scanner *s = &c->scan[REQUEST];
	u8 sampled = FLAG_SAMPLED;
	u32 bad = 0;

	c->trace_id_high = 0;
	c->parent_id = 0;
	c->flags = FLAG_SAMPLED;	/* a new root's, where the head's decision is malformed */
	if (HAS(s, HEADER_SAMPLED)) {
		u16 length = s->length_of[HEADER_SAMPLED];
		u64 value = *(u64 *)c->text.sampled;

		/* The text may go on with spaces that are not the value's. */
		value &= length < 8 ? (1ULL << length * 8) - 1 : 0;
		if (value == '0' || value == TEXT8('f', 'a', 'l', 's', 'e', 0, 0, 0))
			sampled = 0;
		else if (value != '1' && value != TEXT8('t', 'r', 'u', 'e', 0, 0, 0, 0))
			return CONTEXT_MALFORMED;
	}
	c->flags = 0;
	if (HAS(s, HEADER_FLAGS) && s->length_of[HEADER_FLAGS] == 1 && c->text.flags[0] == '1') {
		sampled = FLAG_SAMPLED;
		c->flags = FLAG_ACCEPTED_DEBUG;
	}
	c->flags |= sampled;
	if (!HAS(s, HEADER_TRACE_ID) && !HAS(s, HEADER_SPAN_ID))
		return HAS(s, HEADER_PARENT_ID) ? CONTEXT_MALFORMED : CONTEXT_ABSENT;
	if (!HAS(s, HEADER_TRACE_ID) || !HAS(s, HEADER_SPAN_ID))
		return CONTEXT_MALFORMED;

	if (s->length_of[HEADER_TRACE_ID] == 32) {
		c->trace_id_high = hex_read(c->text.trace_id, &bad);
		c->trace_id_low = hex_read(c->text.trace_id + 16, &bad);
	} else if (s->length_of[HEADER_TRACE_ID] == 16) {
		c->trace_id_low = hex_read(c->text.trace_id, &bad);
	} else {
		return CONTEXT_MALFORMED;
	}
	c->span_id = hex_read(c->text.span_id, &bad);
	if (HAS(s, HEADER_PARENT_ID) && s->length_of[HEADER_PARENT_ID]) {
		if (s->length_of[HEADER_PARENT_ID] != 16)
			return CONTEXT_MALFORMED;
		c->parent_id = hex_read(c->text.parent_id, &bad);
	}
	if (bad || s->length_of[HEADER_SPAN_ID] != 16 || !c->span_id ||
	    !(c->trace_id_low | c->trace_id_high))
		return CONTEXT_MALFORMED;
	return CONTEXT_VALID;
}

/* The exchange that `thread` serves, or NULL where that is not certain. */
static inline struct connection *served_by(u64 thread)
{
	struct serving *serving = servings.lookup(&thread);
	struct connection *c;
	u32 write_seq = 0, process = thread >> 32;
	u64 sock;

	if (!serving)
		return 0;
	if (serving->multiplexed || roaming.lookup(&process)) {
		lose(LOSS_LINK_AMBIGUOUS);
		return 0;
	}
	sock = serving->sock;
	c = connections.lookup(&sock);
	if (!c || !c->open || c->role != ROLE_SERVER || c->thread != thread ||
	    c->span_id != serving->span_id)
		return 0;
	/* Bytes of a response that no hook has seen: it may be long finished. */
	KERNEL_READ(write_seq, (void *)sock, tcp_sock, write_seq);
	if (write_seq != c->send_seq)
		return 0;
	return c;
}

/* A response begins. Where another thread sends it than the one that received the
 * request, work moves between threads (Go, virtual threads, pools): what a thread serves
 * is then nobody's knowledge, in the whole process, from now on. */
static inline void note_roaming(struct connection *c, u64 thread)
{
	u32 process = thread >> 32;
	u8 yes = 1;

	if (c->role == ROLE_SERVER && c->thread != thread && !roaming.lookup(&process) &&
	    roaming.update(&process, &yes))
		lose(LOSS_THREADS_FULL);
}

static inline void new_root(struct connection *c)
{
	c->trace_id_high = random64();
	c->trace_id_low = random64();
	c->span_id = c->trace_id_low;	/* as Envoy: E zipkin/tracer.cc */
	c->parent_id = 0;
	c->link = LINK_NONE;
}

/* What outlives the request's scanner. */
static inline void keep_request(struct connection *c)
{
	struct scanner *s = &c->scan[REQUEST];
	u16 length = HAS(s, HEADER_REQUEST_ID) ? s->length_of[HEADER_REQUEST_ID] : 0;

	c->request_minor = s->minor;
	c->request_id_length = length <= TEXT_LEN(request_id) ? length : 0;
	c->status = 0;
	c->open = 1;
}

/* A request's head has left this end: its context, as a client's. */
static inline int client_context(struct connection *c)
{
	int found = read_head_context(c);
	struct connection *served;

	keep_request(c);
	if (found == CONTEXT_VALID) {
		c->parent_id = c->span_id;
		c->span_id = random64();
		c->link = LINK_HEADER;
		return found;
	}
	served = served_by(c->thread);
	/* Keep the compiler from testing its parts again instead of the pointer. */
	asm volatile("" : "+r"(served));
	if (found == CONTEXT_ABSENT && served) {
		c->trace_id_high = served->trace_id_high;
		c->trace_id_low = served->trace_id_low;
		c->parent_id = served->span_id;
		c->span_id = random64();
		c->link = LINK_THREAD;
		/* An own decision without ids wins over the served exchange's. */
		if (!HAS(&c->scan[REQUEST], HEADER_SAMPLED))
			c->flags = served->flags & (FLAG_SAMPLED | FLAG_ACCEPTED_DEBUG);
		if (!HAS(&c->scan[REQUEST], HEADER_REQUEST_ID) &&
		    served->request_id_length == 36) {
			__builtin_memcpy(c->text.request_id, served->text.request_id, 36);
			c->request_id_length = 36;
		}
		return found;
	}
	new_root(c);
	return found;
}

/* A request's head has reached this end: its context, as a server's, and the
 * thread's. */
static inline void server_context(struct connection *c)
{
	struct serving *old, new = {};
	u64 thread = c->thread;
	struct connection *other;
	u64 sock;

	keep_request(c);
	if (read_head_context(c) == CONTEXT_VALID) {
		c->flags |= FLAG_SHARED;
		c->link = LINK_HEADER;
	} else {
		new_root(c);
	}
	new.sock = c->sock;
	new.span_id = c->span_id;
	old = servings.lookup(&thread);
	if (old) {
		sock = old->sock;
		other = connections.lookup(&sock);
		if (old->multiplexed || (other && other != c && other->open &&
					 other->thread == thread &&
					 other->span_id == old->span_id))
			new.multiplexed = 1;
	}
	if (servings.update(&thread, &new))
		lose(LOSS_THREADS_FULL);
}

#endif
