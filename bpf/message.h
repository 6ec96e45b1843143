/* message: what to do when a head, or a whole message, has passed. Shared by the two
 * ways in which bytes pass: sk_msg (request.c) and kprobes (bytes.c).
 */
#ifndef PODSPAN_MESSAGE_H
#define PODSPAN_MESSAGE_H

#include "context.h"

/* Follow this connection no more. We would not see the end of an exchange under way: no
 * thread serves a received one any longer; a sent one, whose headers may have arrived,
 * ends with the connection. */
static inline void forsake(struct connection *c, u32 reason)
{
	lose(reason);
	if (c->role == ROLE_SERVER || reason == LOSS_PIPELINED)
		c->open = 0;
	c->scan[REQUEST].state = SCAN_OPAQUE;
	c->scan[RESPONSE].state = SCAN_OPAQUE;
}

/* Bytes that no hook saw have passed: only a body's bytes may. */
static inline int catch_up(struct connection *c, int is_response, u32 missed)
{
	struct scanner *s = &c->scan[is_response & 1];
	u64 skipped = scan_skip(s, missed);

	if (is_response)
		c->response_bytes += skipped;
	else
		c->request_bytes += skipped;
	if (skipped != missed) {
		forsake(c, LOSS_BYTES_MISSED);
		return 0;
	}
	if (s->state == SCAN_DONE) {
		if (is_response)
			finish(c, END_COMPLETE);
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
	missed = write_seq - c->send_seq;
	if (missed < 0)
		*again = -missed;
	if (missed <= 0)
		return 1;
	c->send_seq = write_seq;
	return catch_up(c, is_response, missed);
}

/* Bytes are about to be scanned. Returns whether they are worth it. */
static inline int message_begins(struct connection *c, int is_response, u64 now)
{
	struct scanner *s = &c->scan[REQUEST];
	u32 again;

	if (is_response) {
		if (c->scan[RESPONSE].state == SCAN_OPAQUE)
			return 0;
		if (!c->open) {
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
		if (c->open) {
			if (!c->response_first_ns) {
				forsake(c, LOSS_PIPELINED);
				return 0;
			}
			finish(c, END_NEXT_REQUEST);
			scan_next(&c->scan[RESPONSE]);
		}
		c->request_first_ns = now;
		__builtin_memset(&c->text, 0, sizeof(c->text));
		c->request_bytes = 0;
		c->response_bytes = 0;
		c->response_first_ns = 0;
	}
	c->request_last_ns = now;
	return 1;
}

/* A response's head is complete. */
static inline void response_head(struct connection *c)
{
	struct scanner *s = &c->scan[RESPONSE];
	u16 status = s->status;
	u32 method = *(u32 *)c->text.method;
	int is_head = method == ('H' | 'E' << 8 | 'A' << 16 | 'D' << 24) &&
		      !c->text.method[4];

	if (status >= 100 && status < 200 && status != 101) {
		/* Interim: the response proper is still to come. */
		scan_next(s);
		c->response_first_ns = 0;
		return;
	}
	c->status = status;
	if (status == 101) {
		finish(c, END_COMPLETE);
		c->scan[REQUEST].state = SCAN_OPAQUE;
		s->state = SCAN_OPAQUE;
		return;
	}
	scan_body(s, is_head || status == 204 || status == 304);
}

#endif
