"""podspan.agent.replay: spans from a capture file, as the agent would have made.

capture.py       the file: scapy's readers, sizes checked, packets in order of time
packets.py       pure: the TCP segment in a packet
streams.py       pure: segments of one direction in order, each byte once
connections.py   pure: which connections there are, and how they end
messages.py      pure: requests and responses of a connection
traces.py        pure: their place in traces; exchanges as the kernel's records
names.py         pure: which service has an address
replay.py        all of these in one line
progress.py      how far it is, on a terminal
command.py       `podspan replay`
"""
