/* exchange: what crosses from the kernel to the agent, one record per finished exchange.
 *
 * Declared nowhere else. bcc builds the Python class from it and reads flat fields
 * only: u8..u64, char, arrays of them. Widest first: no hidden padding. _ns is
 * CLOCK_MONOTONIC, 0 where the moment was not seen; addresses are IPv6, IPv4 as
 * ::ffff:a.b.c.d; ports are host order. Texts are cut at their field's size, and end
 * at the first NUL or at the field's end.
 */
#ifndef PODSPAN_EXCHANGE_H
#define PODSPAN_EXCHANGE_H

enum exchange_role {
	ROLE_UNKNOWN = 0,
	ROLE_CLIENT = 1,	/* this end sent the request */
	ROLE_SERVER = 2,	/* this end received it */
};

/* How the exchange found its parent. */
enum exchange_link {
	LINK_NONE = 0,		/* it did not: a new root */
	LINK_HEADER = 1,	/* from the B3 headers in the request's own head */
	LINK_THREAD = 2,	/* from what the sending thread was serving */
	LINK_UPGRADE = 3,	/* TCP: from the request that made the connection a tunnel */
};

enum exchange_protocol {
	PROTOCOL_HTTP = 1,
	PROTOCOL_TCP = 2,	/* not HTTP/1, or no longer: no request and response in it */
};

/* How the exchange ended. */
enum exchange_end {
	END_COMPLETE = 1,	/* the response's framing says so */
	END_EOF = 2,		/* a response delimited by the connection's end */
	END_CLOSED_HERE = 3,	/* this end closed before the response was complete */
	END_CLOSED_THERE = 4,	/* the peer closed before the response was complete */
	END_RESET = 5,		/* RST, timeout, or another socket error */
	END_NEXT_REQUEST = 6,	/* the response's end was not seen before the next request */
	END_UNSEEN = 7,		/* the connection could not be followed: see losses.h */
	END_CONNECT_FAILED = 8,	/* the connection was never made: see `error` */
	END_INTERVAL = 9,	/* TCP: it goes on, this is a part of it */
};

enum exchange_flags {
	FLAG_SAMPLED = 1,
	FLAG_INJECTED = 2,	/* client: our headers are in the request, or
				 * handed to the worker that would carry it */
	FLAG_SHARED = 4,	/* server: the ids came from the caller's headers */
	FLAG_ACCEPTED_DEBUG = 8,	/* x-b3-flags: 1 */
};

/* PROTOCOL_TCP: request_ is what the opening end sent, response_ what it received, and
 * the times are those of the first and last bytes each way; there is no text. */
struct exchange_record {
	u64 trace_id_high;
	u64 trace_id_low;
	u64 span_id;
	u64 parent_id;		/* 0: root */
	u64 connect_start_ns;	/* connect times: a connection's first exchange only */
	u64 connect_end_ns;
	u64 request_first_ns;
	u64 request_last_ns;
	u64 response_first_ns;
	u64 response_last_ns;
	u64 request_bytes;	/* of the body, without chunk framing */
	u64 response_bytes;
	u64 sock;		/* struct sock address: unique while it is open */
	u32 netns;		/* inode of the network namespace */
	u32 pid;		/* user space's pid (the kernel's tgid) and tid of the thread */
	u32 tid;		/* that sent (client) or received (server) the request's head */
	u32 retransmits;	/* segments that this end sent again meanwhile */
	u16 local_port;
	u16 peer_port;
	u16 status;		/* 0: no response head seen */
	u16 error;		/* errno of the socket when it ended; 0: none */
	u8 role;
	u8 link;
	u8 end;
	u8 flags;
	u8 request_minor;	/* HTTP/1.x */
	u8 protocol;
	u8 reserved[2];
	u8 local_addr[16];
	u8 peer_addr[16];
	char method[16];
	char target[256];	/* request-target, as it stands in the request line */
	char host[96];
	char user_agent[96];
	char request_id[40];	/* x-request-id, after injection */
	char client_trace_id[40];	/* x-client-trace-id */
	char comm[16];
};
_Static_assert(sizeof(struct exchange_record) == 728, "padding");

#endif
