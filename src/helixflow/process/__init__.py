"""Starting, watching and ending processes. What enters are argument lists and file descriptors; what leaves are exit
statuses and log lines. It knows nothing of models, requests or keys, and never loads asyncio or gRPC: the launcher,
which must outlive everything else, is built from it.
"""
