/* connection: what is known of each traced TCP connection, and of each serving thread.
 *
 * One table entry per connection of a traced pod, made when it is established (or, where
 * it is older than the agent, when it first moves a byte) and removed when it closes. An
 * entry is changed by whoever sends or receives on the socket; HTTP/1 takes turns, so
 * these do not meet.
 */
#ifndef PODSPAN_CONNECTION_H
#define PODSPAN_CONNECTION_H

#include "exchange.h"
#include "handoff.h"
#include "kernel.h"
#include "losses.h"
#include "scanner.h"

#define REQUEST 0
#define RESPONSE 1

/* An exchange, as far as its request tells. */
struct request {
	struct scan_text text;
	u64 trace_id_high;
	u64 trace_id_low;
	u64 span_id;
	u64 parent_id;
	u64 first_ns;
	u64 last_ns;
	u64 bytes;
	u64 thread;		/* pid_tgid that sent or received the head */
	u8 link;
	u8 flags;
	u8 minor;
	u8 request_id_length;	/* of text.request_id, 0 where it is none or cut */
	u8 reserved[4];
	char comm[16];
};

struct connection {
	struct scanner scan[2];	/* REQUEST, RESPONSE */
	struct request request;	/* the newest; earlier ones without a response are parked */
	u8 hex[64];		/* sk_msg: trace id, span id, parent id as they are written */
	u64 sock;
	u64 cookie;		/* tells this socket from a later one at the same address */
	u64 connect_start_ns;
	u64 connect_end_ns;
	u64 response_first_ns;	/* of the response to the oldest request */
	u64 response_last_ns;
	u64 response_bytes;
	u64 sent;		/* all bytes, up to send_seq */
	u64 received;
	u64 sent_before;	/* those that the TCP exchange does not count */
	u64 received_before;
	u64 part_since_ns;	/* TCP: when the current interval began */
	u32 netns;
	u32 send_seq;		/* write_seq up to which the bytes were seen */
	u32 recv_seq;		/* copied_seq likewise */
	u32 retransmits;	/* tcp_sock's total_retrans at the last record */
	u32 parked_first;	/* numbers of the parked requests: first to end - 1 */
	u32 parked_end;
	u32 message_at;		/* sk_msg: bytes of this message done with */
	u32 cursor;		/* sk_msg: the same within the readable piece */
	u32 write;		/* sk_msg: bits of enum scan_header: write the value anew */
	u32 hide;		/* sk_msg: likewise: write over the name */
	u16 insert;		/* sk_msg: bits of INSERT_: lines that are missing */
	u16 insert_length;
	u16 local_port;
	u16 peer_port;
	u16 status;
	u16 error;		/* errno */
	u8 role;
	u8 open;		/* enum exchange_state of `request` */
	u8 heads;		/* a request's head was understood: it speaks HTTP/1 */
	u8 ended_first;		/* the peer's FIN came before ours */
	u8 fin_sent;		/* write_seq counts our own FIN */
	u8 enrolled;		/* its sends pass request.c */
	u8 watched;		/* sockops tells of its states */
	u8 old;			/* older than the agent, and not yet in step: see in_step() */
	u8 inherited;		/* from an agent before this one: bytes may have passed between */
	u8 tries;		/* old: turns at which no request began */
	u8 turn;		/* REQUEST or RESPONSE: what passed last */
	u8 tcp;			/* enum tcp_mode */
	u8 b3_form;		/* sk_msg: the parts of the b3 header that can be written */
	u8 whole;		/* `sent` counts from its first byte, and one agent saw all */
	u8 local_addr[16];
	u8 peer_addr[16];
	u8 reserved[2];
};

enum exchange_state {
	NOT_OPEN,
	OPEN,			/* under way */
	ABANDONED,		/* its end will not be seen */
};

enum tcp_mode {
	TCP_NO,
	TCP_WANTED,		/* it speaks something else: tcp.h begins an exchange */
	TCP_YES,
};

/* What a thread serves: the connection on which it received a request's head. */
struct serving {
	u64 sock;
	u64 span_id;		/* to tell this exchange from a later one */
	u64 since_ns;
	u8 multiplexed;		/* took a request while another was open: an event loop */
	u8 reserved[7];
};

struct parked_key {
	u64 sock;
	u32 number;
	u32 reserved;
};

/* A socket that is older than the agent, which tells what it found out of it. */
struct old_socket {
	u8 role;
};

/* A connect(2) under way, by thread: failure.c. */
struct attempt {
	u64 sock;
	u8 peer_addr[16];
	u32 netns;
	u16 peer_port;
	u8 reserved[2];
};

struct policy {
	u64 sample_below;	/* of 2^32: which hashes of trace ids are sampled */
	u8 what;		/* POLICY_ bits */
	u8 reserved[7];
};
#define POLICY_TRACE 1
#define POLICY_ENROL 2	/* and write headers into its requests */
#define POLICY_REDIRECT 4	/* of those not enrolled, hand the contexts to workers */

BPF_ARRAY(grammar, struct scan_table, 1);
BPF_HASH(header_names, struct scan_name, struct scan_entry, 16);
BPF_HASH(connections, u64, struct connection, MAX_CONNECTIONS);
BPF_HASH(old_sockets, u64, struct old_socket, MAX_CONNECTIONS);	/* by cookie */
BPF_HASH(parked, struct parked_key, struct request, MAX_PARKED);
BPF_HASH(servings, u64, struct serving, MAX_THREADS);
BPF_HASH(attempts, u64, struct attempt, MAX_THREADS);
BPF_HASH(roaming, u32, u8, MAX_THREADS);	/* processes: see context.h */
BPF_ARRAY(no_connection, struct connection, 1);	/* zeroes: too many for the stack */
BPF_PERCPU_ARRAY(losses, u64, LOSSES);
BPF_RINGBUF_OUTPUT(exchanges, RING_PAGES);
BPF_HASH(policies, u32, struct policy, 4096);	/* by network namespace */
BPF_ARRAY(other_policy, struct policy, 1);	/* of the namespaces not named there */

static inline struct scan_entry *scan_lookup(struct scan_name *name)
{
	return header_names.lookup(name);
}

static inline void lose(u32 reason)
{
	u64 *count = losses.lookup(&reason);

	if (count)
		__sync_fetch_and_add(count, 1);
}

static inline struct policy *policy_of(u32 netns)
{
	u32 zero = 0;
	struct policy *policy = policies.lookup(&netns);

	if (!policy)
		policy = other_policy.lookup(&zero);
	return policy;
}

static inline u8 what_to_do(u32 netns)
{
	struct policy *policy = policy_of(netns);

	return policy ? policy->what : 0;
}

#define NO_WAKEUP 1	/* BPF_RB_NO_WAKEUP: the agent polls, no call pays for waking it */

/* The sending (client) or receiving (server) thread has passed a request's head. */
static inline void remember_thread(struct request *r, u64 thread)
{
	void *task = (void *)bpf_get_current_task();

	r->thread = thread;
	KERNEL_READ(r->comm, task, task_struct, comm);
}

static inline void tuple_of(struct tuple *t, struct connection *c)
{
	__builtin_memcpy(t->local_addr, c->local_addr, sizeof(t->local_addr));
	__builtin_memcpy(t->peer_addr, c->peer_addr, sizeof(t->peer_addr));
	t->netns = c->netns;
	t->local_port = c->local_port;
	t->peer_port = c->peer_port;
}

/* A worker reports this connection's exchanges itself. */
static inline int is_claimed(struct connection *c)
{
	struct tuple tuple = {};

	tuple_of(&tuple, c);
	return claims.lookup(&tuple) != 0;
}

/* A connection's address is free for another. */
static inline void forget_claim(struct connection *c)
{
	struct tuple tuple = {};

	tuple_of(&tuple, c);
	claims.delete(&tuple);
}

/* One record for the agent, which counts all exchanges and makes spans of the sampled. */
static inline void emit(struct connection *c, struct request *q, u8 end, u8 protocol)
{
	struct exchange_record *r;
	u32 retransmits = 0;
	u64 connect_start_ns = c->connect_start_ns, connect_end_ns = c->connect_end_ns;

	KERNEL_READ(retransmits, (void *)c->sock, tcp_sock, total_retrans);
	/* These are the first exchange's, reported or not. */
	c->connect_start_ns = 0;
	c->connect_end_ns = 0;
	if (protocol == PROTOCOL_TCP && is_claimed(c))
		return;
	r = exchanges.ringbuf_reserve(sizeof(*r));
	if (!r) {
		lose(LOSS_RING_FULL);
		return;
	}
	r->trace_id_high = q->trace_id_high;
	r->trace_id_low = q->trace_id_low;
	r->span_id = q->span_id;
	r->parent_id = q->parent_id;
	r->connect_start_ns = connect_start_ns;
	r->connect_end_ns = connect_end_ns;
	r->request_first_ns = q->first_ns;
	r->request_last_ns = q->last_ns;
	r->response_first_ns = c->response_first_ns;
	r->response_last_ns = c->response_last_ns;
	r->request_bytes = q->bytes;
	r->response_bytes = c->response_bytes;
	r->sock = c->sock;
	r->netns = c->netns;
	r->pid = q->thread >> 32;
	r->tid = q->thread;
	r->retransmits = retransmits - c->retransmits;
	r->local_port = c->local_port;
	r->peer_port = c->peer_port;
	r->status = c->status;
	r->error = end == END_RESET || end == END_CONNECT_FAILED ? c->error : 0;
	r->role = c->role;
	r->link = q->link;
	r->end = end;
	r->flags = q->flags;
	r->request_minor = q->minor;
	r->protocol = protocol;
	__builtin_memset(r->reserved, 0, sizeof(r->reserved));
	__builtin_memcpy(r->local_addr, c->local_addr, sizeof(r->local_addr));
	__builtin_memcpy(r->peer_addr, c->peer_addr, sizeof(r->peer_addr));
	/* By helper: as instructions, in each place where an exchange can end, these copies
	 * would be most of what clang compiles. */
	bpf_probe_read_kernel(r->method, TEXT_AT(trace_id), &q->text);
	__builtin_memcpy(r->comm, q->comm, sizeof(r->comm));
	exchanges.ringbuf_submit(r, NO_WAKEUP);
	c->retransmits = retransmits;
}

static inline struct parked_key first_parked(struct connection *c)
{
	struct parked_key key = {};

	key.sock = c->sock;
	key.number = c->parked_first;
	return key;
}

static inline int has_parked(struct connection *c)
{
	return c->parked_first != c->parked_end;
}

/* The request whose response is due, NULL where there is none. */
static inline struct request *oldest(struct connection *c)
{
	struct parked_key key = first_parked(c);

	if (has_parked(c))
		return parked.lookup(&key);
	return c->open ? &c->request : 0;
}

static inline void response_forgotten(struct connection *c)
{
	c->response_first_ns = 0;
	c->response_bytes = 0;
	c->status = 0;
}

static inline void forget_text(struct request *q)
{
	u32 zero = 0;
	struct connection *empty = no_connection.lookup(&zero);

	if (empty)
		bpf_probe_read_kernel(&q->text, sizeof(q->text), &empty->request.text);
}

/* No thread serves this request any longer. */
static inline void stop_serving(struct connection *c, struct request *q)
{
	u64 thread = q->thread;
	struct serving *serving = servings.lookup(&thread);

	if (serving && serving->sock == c->sock && serving->span_id == q->span_id &&
	    !serving->multiplexed)
		servings.delete(&thread);
}

/* The oldest exchange is over: one record for the agent, nothing left behind. */
static inline void finish(struct connection *c, u8 end)
{
	struct parked_key key = first_parked(c);
	struct request *q = &c->request;
	int was_parked = has_parked(c);

	if (was_parked) {
		c->parked_first++;
		q = parked.lookup(&key);
		if (!q)
			return;
	} else {
		if (!c->open)
			return;
		c->open = NOT_OPEN;
	}
	if (c->role == ROLE_SERVER)
		stop_serving(c, q);
	emit(c, q, end, PROTOCOL_HTTP);
	if (was_parked)
		parked.delete(&key);
	response_forgotten(c);
}

/* A request begins before the response to the last one has: keep that one aside. */
static inline int park(struct connection *c)
{
	struct parked_key key = {};

	if (c->parked_end - c->parked_first >= PARKED_MAX)
		return 0;
	key.sock = c->sock;
	key.number = c->parked_end;
	if (parked.update(&key, &c->request))
		return 0;
	c->parked_end++;
	c->open = NOT_OPEN;
	return 1;
}

#endif
