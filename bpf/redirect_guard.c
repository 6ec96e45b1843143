/* redirect_guard: may this connection be redirected to the agent?
 *
 * Hook:  xt_bpf, the first packet of a TCP connection in the nat table (the rules of
 *        init/plan.py); since Linux 4.16 for pinned programs.
 * Cost:  0.4 us of the 50 that a connection takes over veth (tests/bench/test_guard.py).
 * Blind: connections made before the answer changed, as the nat table asks only once;
 *        IPv6 with extension headers, which is never redirected.
 *
 * Rules hold the program, and the program its maps, that were pinned when the rules
 * were made. So these outlive the agent, and yes is said only while somebody is alive to
 * be redirected to.
 */
#include "kernel.h"

/* These two cross from the agent; declared nowhere else. */
struct redirect_state {
	u64 heartbeat_ns;	/* CLOCK_MONOTONIC; 0: no agent */
	u64 grace_ns;		/* a heartbeat is fresh for so long */
};
_Static_assert(sizeof(struct redirect_state) == 16, "padding");

/* That there is such an entry says yes; its value says nothing. */
struct redirect_policy {
	u32 netns;	/* inode of the pod's network namespace */
	u16 port;	/* destination, host order; 0: every port */
	u8 inbound;	/* 1: what reaches the pod, 0: what the pod opens */
	u8 protocol;	/* IPPROTO_TCP */
};
_Static_assert(sizeof(struct redirect_policy) == 8, "padding");

BPF_ARRAY(redirect_states, struct redirect_state, 1);
BPF_HASH(redirect_policies, struct redirect_policy, u8, MAX_POLICIES);

/* The context is the kernel's own sk_buff. Read as memory it has more fields than the
 * verifier knows. */
static inline u32 netns_of_packet(struct __sk_buff *skb, int inbound)
{
	void *sk = 0, *dev = 0, *net = 0;
	u32 inode = 0;

	if (!inbound) {
		/* No device yet: the route's is not the packet's. */
		KERNEL_READ(sk, skb, sk_buff, sk);
		return netns_of(sk);
	}
	KERNEL_READ(dev, skb, sk_buff, dev);
	KERNEL_READ(net, dev, net_device, nd_net);
	KERNEL_READ(inode, net + OFFSET(net, ns), ns_common, inum);
	return inode;
}

/* Protocol and port. In these hooks a packet begins with its IP header. */
static inline void read_headers(struct __sk_buff *skb, struct redirect_policy *policy)
{
	u8 first = 0;
	u16 port = 0;
	u32 size;

	bpf_skb_load_bytes(skb, 0, &first, sizeof(first));
	if (first >> 4 == 4) {
		size = (first & 15) * 4;
		bpf_skb_load_bytes(skb, 9, &policy->protocol, 1);
	} else {
		/* An extension header names itself here, and no policy names it. */
		size = 40;
		bpf_skb_load_bytes(skb, 6, &policy->protocol, 1);
	}
	bpf_skb_load_bytes(skb, size + 2, &port, sizeof(port));
	policy->port = bpf_ntohs(port);
}

int redirect_guard(struct __sk_buff *skb)
{
	struct redirect_policy policy = {};
	struct redirect_state *state;
	u64 heartbeat_ns;
	int only = 0;

	state = redirect_states.lookup(&only);
	if (!state)
		return 0;
	/* Before the clock is read: a heartbeat from the future would look ancient. */
	heartbeat_ns = state->heartbeat_ns;
	if (!heartbeat_ns || bpf_ktime_get_ns() - heartbeat_ns >= state->grace_ns)
		return 0;

	/* Only what came in by an interface has one; what is sent here has none yet. */
	policy.inbound = !!skb->ingress_ifindex;
	policy.netns = netns_of_packet(skb, policy.inbound);
	read_headers(skb, &policy);
	if (redirect_policies.lookup(&policy))
		return 1;
	policy.port = 0;
	return !!redirect_policies.lookup(&policy);
}
