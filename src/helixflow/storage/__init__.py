"""The database: engine, schema and migrations. What enters are statements and what leaves are rows or one clear error.

It never knows what the rows mean, and nothing on the path of an API request waits for it.
"""
