/* redirect_guard: may this connection be redirected to the agent?
 *
 * Hook:  xt_bpf, the first packet of a TCP connection in the nat table (the rules of
 *        init/plan.py); since Linux 4.16 for pinned programs.
 * Cost:  one map lookup and one clock read per connection.
 * Blind: connections made before the answer changed; the nat table asks only once.
 *
 * Rules hold the program, and the program its map, that were pinned when the rules were
 * made. So both outlive the agent, and yes is said only while somebody is alive to be
 * redirected to.
 */

/* Crosses from the agent; declared nowhere else. Widest first: no hidden padding. */
struct redirect_state {
	u64 heartbeat_ns;	/* CLOCK_MONOTONIC; 0: no agent */
	u64 grace_ns;		/* a heartbeat is fresh for so long */
	u32 outbound;		/* non-zero: redirect what the pod opens */
	u32 inbound;		/* non-zero: redirect what reaches the pod */
};
_Static_assert(sizeof(struct redirect_state) == 24, "padding");

BPF_ARRAY(redirect_states, struct redirect_state, 1);

int redirect_guard(struct __sk_buff *skb)
{
	struct redirect_state *state;
	u64 heartbeat_ns;
	u32 wanted;
	int only = 0;

	state = redirect_states.lookup(&only);
	if (!state)
		return 0;

	/* Only what came in by an interface has one; what is sent here has none yet. */
	wanted = skb->ingress_ifindex ? state->inbound : state->outbound;
	if (!wanted)
		return 0;

	/* Before the clock is read: a heartbeat from the future would look ancient. */
	heartbeat_ns = state->heartbeat_ns;
	return bpf_ktime_get_ns() - heartbeat_ns < state->grace_ns;
}
