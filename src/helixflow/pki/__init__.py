"""Who our processes are to each other: the certificate authority, the certificates of services, their renewal.

What enters are settings and files under `data_dir/pki`; what leaves are certificates, identities that follow their
files, TLS contexts, and advice on whom to trust. It opens no socket, and no private key gets into a log or an error.
"""
