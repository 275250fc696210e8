"""The endpoints, one module for each kind of resource: its models and how they become the messages of RPCs."""
