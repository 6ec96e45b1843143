/* message: what to do when a head, or a whole message, has passed. Shared by the two
 * ways in which bytes pass: sk_msg (request.c) and kprobes (bytes.c).
 */
#ifndef PODSPAN_MESSAGE_H
#define PODSPAN_MESSAGE_H

#include "context.h"
#include "tcp.h"

#define OLD_TRIES 16	/* turns; then an old connection is taken for one that speaks no HTTP */

static inline void look_no_more(struct connection *c)
{
	c->scan[REQUEST].state = SCAN_OPAQUE;
	c->scan[RESPONSE].state = SCAN_OPAQUE;
}

/* Follow this connection no more. The exchange under way ends with the connection, unseen,
 * and is nobody's parent. One that never spoke HTTP is TCP's: tcp.h. */
static inline void forsake(struct connection *c, u32 reason)
{
	look_no_more(c);
	if (c->inherited) {
		/* Found again as an old one is. */
		c->inherited = 0;
		if (c->open)
			lose(LOSS_RESTART);
		c->open = NOT_OPEN;
		c->old = 1;
		return;
	}
	if (c->old) {
		/* Perhaps the middle of a message: see in_step(). */
		if (++c->tries < OLD_TRIES || !TCP_SPANS) {
			if (c->open || c->tries == 1)
				lose(LOSS_OLD_CONNECTION);
			c->open = NOT_OPEN;
			return;
		}
		c->old = 0;
		c->tcp = TCP_WANTED;
		return;
	}
	if (TCP_SPANS && !c->heads &&
	    (reason == LOSS_REQUEST_UNPARSED || reason == LOSS_RESPONSE_UNASKED)) {
		c->tcp = TCP_WANTED;
		return;
	}
	lose(reason);
	if (c->open)
		c->open = ABANDONED;
}

/* A connection that is older than the agent: where in its messages it stands is not known.
 * A request can begin only where its end speaks after the other one has. What is taken
 * for a request there may still be a body that looks like one, so nothing is written into
 * a request before an exchange has been seen whole. */
static inline void in_step(struct connection *c, int is_response)
{
	u8 turn = c->turn;

	c->turn = is_response;
	if (!c->old || is_response || turn != RESPONSE || c->scan[REQUEST].state != SCAN_OPAQUE)
		return;
	c->open = NOT_OPEN;
	scan_next(&c->scan[REQUEST]);
	scan_next(&c->scan[RESPONSE]);
	response_forgotten(c);
}

/* A response has ended where a piece of bytes did. */
static inline void exchange_complete(struct connection *c, int at_end)
{
	if (c->old && at_end && c->heads && c->scan[REQUEST].state == SCAN_START &&
	    !has_parked(c))
		c->old = 0;
	c->inherited = 0;
	finish(c, END_COMPLETE);
}

/* Bytes that no hook saw have passed: only a body's bytes may. */
static inline int catch_up(struct connection *c, int is_response, u32 missed)
{
	struct scanner *s = &c->scan[is_response & 1];
	u64 skipped = scan_skip(s, missed);

	if (is_response)
		c->response_bytes += skipped;
	else
		c->request.bytes += skipped;
	if (skipped != missed) {
		forsake(c, LOSS_BYTES_MISSED);
		return 0;
	}
	if (s->state == SCAN_DONE) {
		if (is_response)
			exchange_complete(c, 1);
		scan_next(s);
	}
	return 1;
}

/* Take note of what was sent by a way that no hook sees. Returns `send_seq` behind
 * `write_seq`: bytes that were seen, not taken by the kernel, and will come again. */
static inline int sync_sent(struct connection *c, int is_response, u32 *again)
{
	u32 write_seq = 0;
	s32 missed;

	*again = 0;
	KERNEL_READ(write_seq, (void *)c->sock, tcp_sock, write_seq);
	missed = write_seq - c->fin_sent - c->send_seq;
	if (missed < 0)
		*again = -missed;
	if (missed <= 0)
		return 1;
	sent_up_to(c, c->send_seq + missed);
	return catch_up(c, is_response, missed);
}

/* The same of what the application received. */
static inline int sync_received(struct connection *c, int is_response)
{
	u32 seq = copied_up_to((void *)c->sock);
	s32 missed = seq - c->recv_seq;

	if (missed <= 0)
		return 1;
	received_up_to(c, seq);
	return catch_up(c, is_response, missed);
}

/* Bytes are about to be scanned. Returns whether they are worth it. */
static inline int message_begins(struct connection *c, int is_response, u64 now)
{
	struct scanner *s = &c->scan[REQUEST];
	struct request *q = &c->request;
	u32 again;

	in_step(c, is_response);
	if (is_response) {
		if (c->scan[RESPONSE].state == SCAN_OPAQUE)
			return 0;
		if (!c->open && !has_parked(c)) {
			c->response_first_ns = now;
			c->response_last_ns = now;
			forsake(c, LOSS_RESPONSE_UNASKED);
			return 0;
		}
		if (!c->response_first_ns) {
			c->response_first_ns = now;
			/* The last of the request may have passed unseen. */
			if (c->enrolled && !sync_sent(c, 0, &again))
				return 0;
		}
		c->response_last_ns = now;
		return 1;
	}
	if (s->state == SCAN_OPAQUE)
		return 0;
	if (s->state == SCAN_START) {
		if (c->open && c->scan[RESPONSE].state == SCAN_UNTIL_EOF) {
			finish(c, END_NEXT_REQUEST);
			scan_next(&c->scan[RESPONSE]);
		}
		/* Where what has passed is not known, it is rather out of step. */
		if (c->open && (c->old || c->inherited || !park(c))) {
			forsake(c, LOSS_PIPELINED);
			return 0;
		}
		/* What was sent again between two exchanges is neither's. */
		if (!has_parked(c))
			KERNEL_READ(c->retransmits, (void *)c->sock, tcp_sock, total_retrans);
		q->first_ns = now;
		q->bytes = 0;
		forget_text(q);
	}
	q->last_ns = now;
	return 1;
}

static inline int is_method(const u8 *method, u64 word)
{
	return *(u64 *)method == word;
}

static inline void note_http2_port(struct connection *c)
{
	struct http2_key key = {};
	u8 yes = 1;

	key.netns = c->netns;
	key.port = c->role == ROLE_SERVER ? c->local_port : c->peer_port;
	key.role = c->role;
	if (http2_seen.update(&key, &yes))
		lose(LOSS_HTTP2_PORTS_FULL);
}

/* Its first bytes are no HTTP/1 request. Are they HTTP/2's preface (RFC 9113 section 3.4)?
 * The last byte of "PRI * HTTP/2" is then where the scanner stopped. */
static inline void note_http2(struct connection *c)
{
	if (c->heads || c->old || c->scan[REQUEST].head_bytes != 12 ||
	    !is_method(c->request.text.method, TEXT8('P', 'R', 'I', 0, 0, 0, 0, 0)) ||
	    *(u16 *)c->request.text.target != '*')
		return;
	note_http2_port(c);
}

/* A response's head is complete; `left` bytes of what passes now follow it. */
static inline void response_head(struct connection *c, u64 left, u64 thread, u64 now)
{
	struct scanner *s = &c->scan[RESPONSE];
	struct request *q = oldest(c);
	u16 status = s->status;
	int is_head, is_connect, was_parked = has_parked(c);

	if (!q) {
		forsake(c, LOSS_RESPONSE_UNASKED);
		return;
	}
	note_roaming(c, q, thread);
	is_head = is_method(q->text.method, TEXT8('H', 'E', 'A', 'D', 0, 0, 0, 0));
	is_connect = is_method(q->text.method, TEXT8('C', 'O', 'N', 'N', 'E', 'C', 'T', 0)) &&
		     status >= 200 && status < 300;
	if (status >= 100 && status < 200 && status != 101) {
		/* Interim: the response proper is still to come. */
		scan_next(s);
		c->response_first_ns = left ? now : 0;
		return;
	}
	c->status = status;
	if (status == 101 || is_connect) {
		finish(c, END_COMPLETE);
		look_no_more(c);
		if (TCP_SPANS && !was_parked)
			tunnel_begins(c, left, now);
		return;
	}
	scan_body(s, is_head || status == 204 || status == 304);
}

#endif
