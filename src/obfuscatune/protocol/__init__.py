"""All that enclave and worker share: addresses, connections, frames and their limits.

    enclave                                                      worker
    Connection.send(fields, tensors)  ->  [ prefix | header | tensor bytes ]  ->  Connection.receive()
    Connection.receive()              <-  [ prefix | header | tensor bytes ]  <-  Connection.send(fields, tensors)

`limits` bounds one frame, `frames` is its encoding (bytes only, no input or output), `connection` moves frames over a
socket without copies, `address` finds or makes that socket. What the fields mean is told in ``docs/protocol.md``.
Nothing here is pickled, and nothing here knows a key, a model or a profile.
"""
