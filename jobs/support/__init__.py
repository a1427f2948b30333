"""What the commands share: parser, consoles, connection, session.

It knows terminals and the environment. It does not know what an embedding is.
"""
