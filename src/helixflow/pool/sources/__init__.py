"""Where model files come from: a source and file names enter, files in a workspace leave; it decides no trust."""
