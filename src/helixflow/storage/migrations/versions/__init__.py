"""One module a step, numbered. A step that was released is never edited."""
