"""The whole method in miniature: a rendered world of short films, its language, a judge that knows the truth, and a
captioner of 0.6 M parameters that ships with the package.

It uses the doors that every user has: films are mp4 files, the captioner is a folder for from_pretrained, the judge is
a function or a server.
"""
