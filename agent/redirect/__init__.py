"""The redirect engine: headers written by listeners inside the pod.

It serves what the kernel's programs cannot: kernels that fail the self-test, requests
that enter without context, HTTP/2 and gRPC.

Pure, bytes in and actions out:
    layer     what a protocol's layer says to the relay
    sniff     a connection's first bytes to its protocol
    http1     HTTP/1: writes into the heads of requests, follows both streams
    http2     HTTP/2 and gRPC
    inject    which headers a context becomes, as the kernel would write them

Shells:
    sockets   listeners in the pod's namespace, original destinations, upstream sockets
    loop      epoll and timers of a worker
    gate      a connection's SYN waits until its destination has answered
    waiting   what waits there, and the connected sockets
    relay     one connection: two sockets and a layer
    worker    a process that serves connections
    control   what workers and agent tell each other
    engine    the agent's side: starts, restarts and counts workers
"""
