/* tcp: exchanges of connections that do not speak HTTP/1, or no longer.
 *
 * One record per connection, or per TCP_INTERVAL_NS of a longer one. Its request_ is what
 * the opening end sent, its response_ what that end received.
 */
#ifndef PODSPAN_TCP_H
#define PODSPAN_TCP_H

#include "context.h"

static inline void sent_up_to(struct connection *c, u32 seq)
{
	c->sent += (s32)(seq - c->send_seq);
	c->send_seq = seq;
}

static inline void received_up_to(struct connection *c, u32 seq)
{
	c->received += (s32)(seq - c->recv_seq);
	c->recv_seq = seq;
}

/* A context of its own: `thread` is the one that moved the connection's first bytes. */
static inline void tcp_begins(struct connection *c, u64 thread, u64 now)
{
	struct head_context none = {};
	struct request *q = &c->request;

	c->tcp = TCP_YES;
	c->part_since_ns = now;
	forget_text(q);
	remember_thread(q, thread);
	if (c->role == ROLE_CLIENT && child_of_served(q, thread))
		return;
	new_root(q);
	q->flags = decide(&none, c->netns, q->trace_id_low);
}

/* The request made the connection a tunnel (101, CONNECT): `left` bytes of what passes
 * now are the tunnel's. Both ends derive the same id from the request's. */
static inline void tunnel_begins(struct connection *c, u64 left, u64 now)
{
	struct request *q = &c->request;
	u64 caller = c->role == ROLE_SERVER && SPAN_IDS_CHILD && q->link == LINK_HEADER ?
			     q->parent_id : q->span_id;

	c->tcp = TCP_YES;
	c->part_since_ns = now;
	c->sent_before = c->sent;
	c->received_before = c->received;
	if (c->role == ROLE_SERVER)
		c->sent_before -= left;
	else
		c->received_before -= left;
	forget_text(q);
	q->parent_id = caller;
	q->span_id = derive_id(~caller);
	if (SPAN_IDS_CHILD && c->role == ROLE_SERVER) {
		q->parent_id = q->span_id;
		q->span_id = derive_id(q->span_id);
	}
	q->link = LINK_UPGRADE;
	q->first_ns = 0;
	q->last_ns = 0;
	c->response_first_ns = 0;
	c->response_last_ns = 0;
}

static inline void tcp_part_ends(struct connection *c, u8 end)
{
	u64 sent = c->sent - c->sent_before, received = c->received - c->received_before;
	struct request *q = &c->request;

	q->bytes = c->role == ROLE_SERVER ? received : sent;
	c->response_bytes = c->role == ROLE_SERVER ? sent : received;
	emit(c, q, end, PROTOCOL_TCP);
	c->sent_before = c->sent;
	c->received_before = c->received;
}

/* Bytes pass in one direction. Called before they are sent and after they are received. */
static inline void tcp_bytes(struct connection *c, int is_response, u64 thread, u64 now)
{
	struct request *q = &c->request;

	if (c->tcp == TCP_WANTED)
		tcp_begins(c, thread, now);

	if (is_response) {
		if (!c->response_first_ns)
			c->response_first_ns = now;
		c->response_last_ns = now;
	} else {
		if (!q->first_ns)
			q->first_ns = now;
		q->last_ns = now;
	}
#if TCP_INTERVAL_NS
	if (now - c->part_since_ns < TCP_INTERVAL_NS)
		return;
	tcp_part_ends(c, END_INTERVAL);
	c->part_since_ns = now;
	q->first_ns = is_response ? 0 : now;
	q->last_ns = q->first_ns;
	c->response_first_ns = is_response ? now : 0;
	c->response_last_ns = c->response_first_ns;
	q->span_id = random64();
	q->flags &= ~FLAG_SHARED;
#endif
}

#endif
