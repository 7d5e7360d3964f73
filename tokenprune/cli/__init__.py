"""The command line: a verb a file, put together by `app`.

Nothing here imports torch, numpy or a decoder when it is imported: help and lists come at once, and
so does the word on what is wrong with a request.
"""
