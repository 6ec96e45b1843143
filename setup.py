"""Build podspan: one distribution, its top-level folders mapped into one namespace.

`agent/` is `podspan.agent` and so on, so that nothing is installed under a bare name.
A subpackage is found by its `__init__.py`. Versions of Python packages are recorded
here and nowhere else, those of Debian packages by the Debian release.
"""

from setuptools import find_packages, setup

FOLDERS = ("agent", "bpf", "init")

setup(
    name="podspan",
    version="0.1.0",
    description="Istio's distributed traces without sidecars, by eBPF",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={f"podspan.{folder}": folder for folder in FOLDERS},
    packages=[
        package
        for folder in FOLDERS
        for package in (
            f"podspan.{folder}",
            *(f"podspan.{folder}.{sub}" for sub in find_packages(folder)),
        )
    ],
    package_data={"podspan.bpf": ["*.c", "*.h"], "podspan.agent.store": ["viewer/*"]},
    install_requires=[
        # bcc compiles and loads bpf/. It comes from Debian (python3-bpfcc), not from
        # here: the package named bcc on PyPI is another thing.
        "python-iptables~=1.2",  # init: rules in legacy tables, through libxtables
        "h2~=4.4",  # redirect: frames, HPACK and flow control of HTTP/2
        # What workers and agent tell each other; spans in the spool.
        "msgpack~=1.2",
        "opentelemetry-proto~=1.45",  # export: OTLP's messages
        "orjson~=3.13",  # export, store: JSON, an order of magnitude faster than json
        "protobuf>=6,<8",  # store: Zipkin's protobuf format
        "pyroute2~=0.9.7",  # namespaces, links and addresses by netlink
        "scapy~=2.8",  # replay: reads captures
        "urllib3~=2.8",  # export: HTTP with connection reuse
        "waitress~=3.0",  # store: a server of HTTP
    ],
    extras_require={
        # Exact, because a tool's next release may find what this one let pass.
        "test": [
            "aiosmtpd==1.4.6",  # a server that speaks first, for the redirect engine
            "grpcio==1.85.3",  # a real client and server through the HTTP/2 layer
            "hypothesis==6.170.15",  # hostile input: heads, B3 values
            "mypy==2.4.1",
            "playwright==1.65.2",  # drives the system's Chromium through the viewer
            "prometheus-client==0.26.0",  # its parser reads our metrics
            "pytest==9.2.0",
            "ruff==0.17.6",
            "types-protobuf==7.35.1.20260906",  # for mypy
        ],
    },
    entry_points={"console_scripts": ["podspan = podspan.agent.__main__:main"]},
)
