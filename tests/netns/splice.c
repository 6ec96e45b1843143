/* splice: the kernel carries a stream from one socket to its partner.
 *
 * Hook:  sk_skb stream_verdict on a sockhash; without a parser since Linux 5.13.
 * Cost:  tests/bench/README.md.
 * Blind: what was queued before the socket entered, until the next segment comes.
 *
 * No part of podspan: test_redirect_splice.py shows why.
 */
#include "kernel.h"

#define MAX_SOCKETS 1024

BPF_SOCKHASH(ends, u64, MAX_SOCKETS);	/* by socket cookie */
BPF_HASH(partners, u64, u64, MAX_SOCKETS);	/* cookie to cookie */

int carry(struct __sk_buff *skb)
{
	u64 cookie = bpf_get_socket_cookie(skb);
	u64 *partner = partners.lookup(&cookie);

	if (!partner)
		return SK_PASS;
	return ends.sk_redirect_hash(skb, partner, 0);
}
