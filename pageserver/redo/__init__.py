"""WAL redo: a stock Postgres process that rebuilds one page at a time.

walredo.c, redo_page.c, confine.c   the C extension that serves redo over a pipe (walredo.c's head: how, format, trust)
build.py                            compiles it and makes the files that a process is started from
protocol.py                         the pipe protocol, pure
worker.py                           one such process
"""
