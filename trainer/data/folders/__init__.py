"""What the names of files and folders mean, as people and other programs choose them. Nothing is opened here.

- `formats`: which suffixes are images, which are images of formats that are not read, and which are videos.
- `leftovers`: hidden and system files, caches, masks, previews and thumbnails that lie beside images.
- `own_output`: what Kiln itself writes, so that samples never become training images.
- `conventions`: kohya's folders, `10_ohwx woman` and `reg/1_woman`, become subsets with repeats and class words.

`trainer.data.folder_listing` walks through a folder and asks these. What is left out is named in the report.
"""
