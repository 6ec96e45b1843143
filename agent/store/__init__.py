"""The embedded store: a Zipkin-compatible server over SQLite, a process of its own.

command     `podspan store`
server      the sockets and threads
api         Zipkin's API and ours, as WSGI; beside it what it is made of:
            request, origin (browsers), counts (/metrics), viewer_files
zipkin_v2   pure: Zipkin's span formats, in, normalised and merged; zipkin_proto
linker      pure: who called whom in a trace
query       pure: what a search asks for; summary, edges: what it answers
database    traces in a file; sqlite is the only importer of sqlite3
"""
