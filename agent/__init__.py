"""podspan.agent: what runs once per node.

The kernel hands over one record per finished exchange; the agent makes it a span and
sends it away.

    exchange.py   what the kernel told us            kernel/  the only import of bcc
    span.py       exchange -> span                   pods/    namespaces, names
    tree.py       spans -> text                      export/  backends, spool, files
    context.py    a head's trace context: b3.py,     service.py   the loop
                  traceparent.py, ids.py             config.py    flags, variables
    http_head.py  the head of a message, http_body.py  errors.py  what can go wrong
    clock.py      the kernel's clock -> the world's  doctor.py    what a node lacks
    metrics.py    what it says of itself             status.py    to whom, by HTTP
    istio_metrics.py  exchanges -> Istio's metrics   workloads.py  who is at their ends
    engine.py     which engine a pod has, and why    redirect/  workers that carry
    netlink.py    its messages' frame                steering.py  who follows the plan
    outputs.py    where spans go, as the user chose  store/    SQLite, Zipkin's API,
    embedded.py   the store as our child                       the viewer
    values.py     what texts in options mean: parser.py  replay/  spans of a capture
    lifecycle.py  when to end, how to say ready
"""


def version() -> str:
    """Return the version of the installed distribution."""
    # Here, not above: the import costs more than all that `podspan init` does.
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

    try:
        return version("podspan")
    except PackageNotFoundError:
        return "unknown"
