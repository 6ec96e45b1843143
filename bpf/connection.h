/* connection: what is known of each traced TCP connection, and of each serving thread.
 *
 * One table entry per connection of a traced pod, made when it is established and
 * removed when it closes. An entry is changed by whoever sends or receives on the
 * socket; HTTP/1 takes turns, so these do not meet.
 */
#ifndef PODSPAN_CONNECTION_H
#define PODSPAN_CONNECTION_H

#include "exchange.h"
#include "kernel.h"
#include "losses.h"
#include "scanner.h"

#define REQUEST 0
#define RESPONSE 1

struct connection {
	struct scanner scan[2];	/* REQUEST, RESPONSE */
	struct scan_text text;	/* of the request */
	u64 sock;
	u64 trace_id_high;
	u64 trace_id_low;
	u64 span_id;
	u64 parent_id;
	u64 connect_start_ns;
	u64 connect_end_ns;
	u64 request_first_ns;
	u64 request_last_ns;
	u64 response_first_ns;
	u64 response_last_ns;
	u64 request_bytes;
	u64 response_bytes;
	u64 thread;		/* pid_tgid that sent or received the request's head */
	u32 netns;
	u32 send_seq;		/* write_seq up to which the bytes were seen */
	u32 recv_seq;		/* copied_seq likewise */
	u32 message_at;		/* sk_msg: bytes of this message done with */
	u32 cursor;		/* sk_msg: the same within the readable piece */
	u16 local_port;
	u16 peer_port;
	u16 status;
	u8 role;
	u8 link;
	u8 flags;
	u8 open;		/* an exchange is under way */
	u8 closing;		/* the peer's FIN was seen */
	u8 enrolled;		/* its sends pass request.c */
	u8 request_minor;
	u8 request_id_length;	/* of text.request_id, 0 where it is none or cut */
	u8 local_addr[16];
	u8 peer_addr[16];
	char comm[16];
};

/* What a thread serves: the connection on which it received a request's head. */
struct serving {
	u64 sock;
	u64 span_id;		/* to tell this exchange from a later one */
	u8 multiplexed;		/* took a request while another was open: an event loop */
	u8 reserved[7];
};

BPF_ARRAY(grammar, struct scan_table, 1);
BPF_HASH(header_names, struct scan_name, struct scan_entry, 16);
BPF_HASH(connections, u64, struct connection, MAX_CONNECTIONS);
BPF_HASH(servings, u64, struct serving, MAX_THREADS);
BPF_HASH(roaming, u32, u8, MAX_THREADS);	/* processes: see context.h */
BPF_ARRAY(no_connection, struct connection, 1);	/* zeroes: too many for the stack */
BPF_PERCPU_ARRAY(losses, u64, LOSSES);
BPF_RINGBUF_OUTPUT(exchanges, RING_PAGES);
BPF_HASH(policies, u32, u8, 4096);		/* by network namespace */
BPF_ARRAY(other_policy, u8, 1);		/* of the namespaces not named there */

static inline struct scan_entry *scan_lookup(struct scan_name *name)
{
	return header_names.lookup(name);
}

static inline void lose(u32 reason)
{
	u64 *count = losses.lookup(&reason);

	if (count)
		*count += 1;
}

#define POLICY_TRACE 1
#define POLICY_ENROL 2	/* and write headers into its requests */

static inline u8 policy_of(u32 netns)
{
	u32 zero = 0;
	u8 *policy = policies.lookup(&netns);

	if (!policy)
		policy = other_policy.lookup(&zero);
	return policy ? *policy : 0;
}

#define NO_WAKEUP 1	/* BPF_RB_NO_WAKEUP: the agent polls, no call pays for waking it */

/* The sending (client) or receiving (server) thread has passed a request's head. */
static inline void remember_thread(struct connection *c, u64 thread)
{
	void *task = (void *)bpf_get_current_task();

	c->thread = thread;
	KERNEL_READ(c->comm, task, task_struct, comm);
}

/* The exchange is over: one record for the agent, nothing left behind. */
static inline void finish(struct connection *c, u8 end)
{
	struct exchange_record *r;
	struct serving *serving;
	u64 thread = c->thread;

	c->open = 0;
	if (c->role == ROLE_SERVER) {
		serving = servings.lookup(&thread);
		if (serving && serving->sock == c->sock && !serving->multiplexed)
			servings.delete(&thread);
	}
	if (!(c->flags & FLAG_SAMPLED))
		return;
	r = exchanges.ringbuf_reserve(sizeof(*r));
	if (!r) {
		lose(LOSS_RING_FULL);
		return;
	}
	r->trace_id_high = c->trace_id_high;
	r->trace_id_low = c->trace_id_low;
	r->span_id = c->span_id;
	r->parent_id = c->parent_id;
	r->connect_start_ns = c->connect_start_ns;
	r->connect_end_ns = c->connect_end_ns;
	r->request_first_ns = c->request_first_ns;
	r->request_last_ns = c->request_last_ns;
	r->response_first_ns = c->response_first_ns;
	r->response_last_ns = c->response_last_ns;
	r->request_bytes = c->request_bytes;
	r->response_bytes = c->response_bytes;
	r->sock = c->sock;
	r->netns = c->netns;
	r->pid = c->thread >> 32;
	r->tid = c->thread;
	r->local_port = c->local_port;
	r->peer_port = c->peer_port;
	r->status = c->status;
	r->role = c->role;
	r->link = c->link;
	r->end = end;
	r->flags = c->flags;
	r->request_minor = c->request_minor;
	r->protocol = PROTOCOL_HTTP;
	r->error = 0;
	r->retransmits = 0;
	__builtin_memset(r->reserved, 0, sizeof(r->reserved));
	__builtin_memcpy(r->local_addr, c->local_addr, sizeof(r->local_addr));
	__builtin_memcpy(r->peer_addr, c->peer_addr, sizeof(r->peer_addr));
	__builtin_memcpy(r->method, &c->text, TEXT_AT(trace_id));
	__builtin_memcpy(r->comm, c->comm, sizeof(r->comm));
	exchanges.ringbuf_submit(r, NO_WAKEUP);
	c->connect_start_ns = 0;
	c->connect_end_ns = 0;
}

#endif
