/* losses: all that is skipped or lost, counted by reason.
 *
 * The agent reads the names from this file: LOSS_RING_FULL is `ring_full`.
 */
#ifndef PODSPAN_LOSSES_H
#define PODSPAN_LOSSES_H

enum loss {
	LOSS_RING_FULL,		/* a finished exchange found no room in the ring buffer */
	LOSS_CONNECTIONS_FULL,	/* a connection found no room in the table */
	LOSS_THREADS_FULL,	/* a served exchange could not be linked to its thread */
	LOSS_ENROL_FAILED,	/* a client socket could not enter the sockhash */
	LOSS_REQUEST_UNPARSED,	/* not an HTTP/1 request, or not provably one */
	LOSS_RESPONSE_UNPARSED,
	LOSS_RESPONSE_UNASKED,	/* a response without a request */
	LOSS_PIPELINED,		/* more requests ahead of their responses than are kept */
	LOSS_BYTES_MISSED,	/* bytes passed by a way that no hook sees */
	LOSS_BYTES_UNREADABLE,	/* an application's buffer was not in memory */
	LOSS_PIECES,		/* more pieces in one call than the hooks can walk */
	LOSS_OLD_CONNECTION,	/* older than the agent: what passed before its first whole exchange */
	LOSS_RESTART,		/* an exchange of which too much passed while no agent was there */
	LOSS_CONTEXT_MALFORMED,	/* B3 headers that do not parse: the caller's trace ends */
	LOSS_INJECT_OLD,	/* a connection older than the agent, not yet known to be in step */
	LOSS_INJECT_CUT,	/* the end of the head, or an id in it, was cut by sends */
	LOSS_INJECT_REPEATED,	/* more lines of context headers than there should be, too many to hide */
	LOSS_INJECT_BUFFER,	/* no proof that the send buffer takes all at once */
	LOSS_INJECT_MEMORY,	/* the kernel could not make room in the message */
	LOSS_INJECT_DROPPED,	/* and could not undo it: the send failed */
	LOSS_LINK_AMBIGUOUS,	/* a thread serves several exchanges: no parent claimed */
	LOSS_HTTP2_PORTS_FULL,	/* a port that speaks HTTP/2 found no room in the table */
	LOSSES,
};

#endif
