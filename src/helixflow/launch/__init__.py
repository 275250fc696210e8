"""Builds and supervises the processes of a node: the only composition root. What enters is the settings tree;
what leaves are running processes. It decides nothing about a request.
"""
