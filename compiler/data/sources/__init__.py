"""Where pictures lie: folders, tars, Parquet and Arrow shards, tables of paths or URLs.

A *source* is one entry of the recipe. Its pictures lie in files of their own (a folder, a table of
paths) or inside containers (tars, shards). `spots` tells from a path which it is, a reader per
kind (`tars`, `columns`, `tables`) lists one container, and `gather` makes of all listings the same
`Scan` that a folder gives: pictures with a stable name, a size from the header of their bytes, and
the file and place at which the run finds those bytes again. Nothing is ever unpacked to disk, so a
name in a container is only a name. What is remote (`remote`) has been downloaded before a plan is
made; a plan opens no connection.

Names: a picture in a container has the name that the container gives it, with its ending, so that
the same pictures have the same names in a folder, a tar, a table of paths and a Parquet column
that keeps their paths, and are trained in the same order from the same random numbers. A picture
without a name is called by its shard and row, `train_000/00000017`. Where several pictures of one
source have one name (each shard counts from zero, or paths were cut to their last part), each of
them is called by its shard, its number in it and the name: `train_000/17/00.jpg`.
"""
