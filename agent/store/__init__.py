"""The embedded store: a Zipkin-compatible server over SQLite, a process of its own.

zipkin_v2   pure: Zipkin's span formats, in and normalised
linker      pure: who called whom in a trace
query       pure: what a search asks for
database    the only importer of sqlite3
api         WSGI: Zipkin's API, ours, and the viewer's files
server      the sockets and threads under it
exporter    spans of this very process straight into the database
command     `podspan store`
"""
