/* handoff: what the kernel and the redirect engine's workers tell each other.
 *
 * A worker carries the bytes of connections that are redirected to it; the application's
 * own sockets are traced as all others are. Both ends of a table are here; in user space
 * agent/kernel/handoff.py is its only reader and writer.
 */
#ifndef PODSPAN_HANDOFF_H
#define PODSPAN_HANDOFF_H

/* What the agent's own sockets in pods carry (SO_MARK), and those that they accept: no
 * program looks at them. An application that sets the same mark is not traced. */
#define AGENT_MARK 0x539

/* The application's socket, as the application sees it; fields as in exchange_record. */
struct tuple {
	u8 local_addr[16];
	u8 peer_addr[16];
	u32 netns;
	u16 local_port;
	u16 peer_port;
};
_Static_assert(sizeof(struct tuple) == 40, "padding");

/* A request's head: `offset` bytes had been sent, in this connection, at its end. */
struct handed_key {
	struct tuple tuple;
	u64 offset;
};
_Static_assert(sizeof(struct handed_key) == 48, "padding");

/* The context that the kernel has decided for it. */
struct handed {
	u64 trace_id_high;
	u64 trace_id_low;
	u64 span_id;
	u64 parent_id;
	u8 link;
	u8 flags;
	u8 reserved[2];
	char request_id[36];	/* NULs where the head has one of its own */
};
_Static_assert(sizeof(struct handed) == 72, "padding");

/* The span id of a request that a worker has made a root of. */
struct root_key {
	u64 span_id;
	u32 netns;
	u32 reserved;
};
_Static_assert(sizeof(struct root_key) == 16, "padding");

struct http2_key {
	u32 netns;
	u16 port;		/* of the end that was called */
	u8 role;		/* of the end that was seen */
	u8 reserved;
};
_Static_assert(sizeof(struct http2_key) == 8, "padding");

/* Of a connection that is not redirected nobody takes the entries, and of one that has
 * just ended a worker may still write some: so the least recently used go. */
BPF_TABLE("lru_hash", struct handed_key, struct handed, handed, MAX_CONNECTIONS);
BPF_TABLE("lru_hash", struct tuple, u8, claims, MAX_CONNECTIONS);	/* workers report them */
BPF_TABLE("lru_hash", struct root_key, u8, roots, MAX_CONNECTIONS);
BPF_HASH(http2_seen, struct http2_key, u8, MAX_HTTP2_PORTS);	/* who speaks it */

#endif
