/* context: the trace context of an exchange, from its head, its thread, or anew.
 *
 * Order as Envoy's (ISTIO.md section 2): the headers of the request's own head (b3.h says
 * how they are read); else what the sending thread serves; else a new root.
 */
#ifndef PODSPAN_CONTEXT_H
#define PODSPAN_CONTEXT_H

#include "b3.h"
#include "connection.h"

#define HAS(scanner, header) ((scanner)->seen & (1U << (header)))

#if SPAN_IDS_CHILD
/* Span ids that requests brought into a namespace: an application that forwards one means
 * the span that served it. Losing one costs a level of the tree, not its truth, so the
 * least recently used may go. */
struct received {
	u64 span_id;
	u32 netns;
	u32 reserved;
};
BPF_TABLE("lru_hash", struct received, u8, received_ids, MAX_CONNECTIONS);
#endif

static inline u64 random64(void)
{
	u64 value = (u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32();

	return value ? value : 1;
}

/* FLAG_ bits of a trace: what its head says, else what the rate says of its id, which
 * is the same wherever the trace passes. */
static inline u8 decide(struct head_context *h, u32 netns, u64 trace_id_low)
{
	struct policy *policy;

	if (h->decision == DECISION_DEBUG)
		return FLAG_SAMPLED | FLAG_ACCEPTED_DEBUG;
	if (h->decision == DECISION_ACCEPT)
		return FLAG_SAMPLED;
	if (h->decision == DECISION_DENY)
		return 0;
	if (h->forced)
		return FLAG_SAMPLED;
	policy = policy_of(netns);
	return policy && sample_hash(trace_id_low) < policy->sample_below ? FLAG_SAMPLED : 0;
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
	/* What an old connection seems to ask may be a body that looks like a head. */
	if (!c || c->open != OPEN || c->old || c->role != ROLE_SERVER ||
	    c->request.thread != thread || c->request.span_id != serving->span_id)
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
static inline void note_roaming(struct connection *c, struct request *q, u64 thread)
{
	u32 process = thread >> 32;
	u8 yes = 1;

	if (c->role == ROLE_SERVER && q->thread != thread && !roaming.lookup(&process) &&
	    roaming.update(&process, &yes))
		lose(LOSS_THREADS_FULL);
}

/* The thread takes a request that is not understood: what it then sends may be that one's,
 * while it serves another, and the other's. */
static inline void serves_unknown(u64 thread)
{
	struct serving *serving = servings.lookup(&thread);

	if (serving)
		serving->multiplexed = 1;
}

/* For a request that has none. */
static inline void make_request_id(struct request *q, struct scanner *s)
{
	u8 reason = q->flags & FLAG_SAMPLED ? '9' : '4';

	if (q->request_id_length)
		return;
	if (HAS(s, HEADER_CLIENT_TRACE_ID))
		reason = 'b';
	uuid_write(q->text.request_id, random64(), random64(), reason);
	q->request_id_length = 36;
}

static inline void new_root(struct request *q)
{
	q->trace_id_high = random64();
	q->trace_id_low = random64();
	q->span_id = q->trace_id_low;	/* as Envoy: E zipkin/tracer.cc */
	q->parent_id = 0;
	q->link = LINK_NONE;
}

/* Become a child of what `thread` serves; returns the served request, or NULL. */
static inline struct request *child_of_served(struct request *q, u64 thread)
{
	struct connection *served = served_by(thread);

	/* Keep the compiler from testing its parts again instead of the pointer. */
	asm volatile("" : "+r"(served));
	if (!served)
		return 0;
	q->trace_id_high = served->request.trace_id_high;
	q->trace_id_low = served->request.trace_id_low;
	q->parent_id = served->request.span_id;
	q->span_id = random64();
	q->link = LINK_THREAD;
	q->flags = served->request.flags & (FLAG_SAMPLED | FLAG_ACCEPTED_DEBUG);
	return &served->request;
}

/* What outlives the request's scanner; reads its context into `h`. */
static inline void keep_request(struct connection *c, struct head_context *h)
{
	struct scanner *s = &c->scan[REQUEST];
	struct request *q = &c->request;
	u16 length = HAS(s, HEADER_REQUEST_ID) ? s->length_of[HEADER_REQUEST_ID] : 0;

	read_context(h, &q->text, s);
	if (h->malformed)
		lose(LOSS_CONTEXT_MALFORMED);
	q->minor = s->minor;
	q->request_id_length = length <= TEXT_LEN(request_id) ? length : 0;
	c->open = OPEN;
	c->heads = 1;
}

/* A request's head has left this end: its context, as a client's. */
static inline void client_context(struct connection *c, struct head_context *h)
{
	struct request *q = &c->request, *served;
	u64 parent_id;

	if (h->has_ids) {
		q->trace_id_high = h->trace_id_high;
		q->trace_id_low = h->trace_id_low;
		parent_id = h->span_id;
#if SPAN_IDS_CHILD
		struct received received = {};

		received.span_id = parent_id;
		received.netns = c->netns;
		if (received_ids.lookup(&received))
			parent_id = derive_id(parent_id);
#endif
		q->parent_id = parent_id;
		q->span_id = random64();
		q->link = LINK_HEADER;
		q->flags = decide(h, c->netns, q->trace_id_low);
		return;
	}
	served = child_of_served(q, q->thread);
	if (!served) {
		new_root(q);
		q->flags = decide(h, c->netns, q->trace_id_low);
		return;
	}
	/* An own decision without ids wins over the served exchange's. */
	if (h->decision)
		q->flags = decide(h, c->netns, q->trace_id_low);
	if (!HAS(&c->scan[REQUEST], HEADER_REQUEST_ID) && served->request_id_length == 36) {
		__builtin_memcpy(q->text.request_id, served->text.request_id, 36);
		q->request_id_length = 36;
	}
}

/* A worker made this context for a request that had none. True once. */
static inline int is_workers_root(struct connection *c, u64 span_id)
{
	struct root_key key = {};

	key.span_id = span_id;
	key.netns = c->netns;
	if (!roots.lookup(&key))
		return 0;
	roots.delete(&key);
	return 1;
}

/* A request's head has reached this end: its context, as a server's, and the
 * thread's. */
static inline void server_context(struct connection *c, struct head_context *h)
{
	struct request *q = &c->request;
	struct serving *old, new = {};
	u64 thread = q->thread;
	struct connection *other;
	u64 sock;

	if (h->has_ids && is_workers_root(c, h->span_id)) {
		q->trace_id_high = h->trace_id_high;
		q->trace_id_low = h->trace_id_low;
		q->span_id = h->span_id;
		q->parent_id = 0;
		q->link = LINK_NONE;
		q->flags = decide(h, c->netns, q->trace_id_low);
	} else if (h->has_ids) {
		q->trace_id_high = h->trace_id_high;
		q->trace_id_low = h->trace_id_low;
		q->link = LINK_HEADER;
		q->flags = decide(h, c->netns, q->trace_id_low);
#if SPAN_IDS_CHILD
		struct received received = {};
		u8 yes = 1;

		received.span_id = h->span_id;
		received.netns = c->netns;
		received_ids.update(&received, &yes);
		q->parent_id = h->span_id;
		q->span_id = derive_id(h->span_id);
#else
		q->parent_id = h->parent_id;
		q->span_id = h->span_id;
		q->flags |= FLAG_SHARED;
#endif
	} else {
		new_root(q);
		q->flags = decide(h, c->netns, q->trace_id_low);
	}
	new.sock = c->sock;
	new.span_id = q->span_id;
	new.since_ns = q->first_ns;
	new.multiplexed = has_parked(c);
	old = servings.lookup(&thread);
	if (old) {
		sock = old->sock;
		other = connections.lookup(&sock);
		if (old->multiplexed || (other && other != c && other->open &&
					 other->request.thread == thread &&
					 other->request.span_id == old->span_id))
			new.multiplexed = 1;
	}
	if (servings.update(&thread, &new))
		lose(LOSS_THREADS_FULL);
}

#endif
