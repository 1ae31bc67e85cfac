"""What it is trained on: sources, captions, crops, masks."""

from __future__ import annotations

from typing import Annotated, Literal

from attrs import field, frozen

from compiler.schema.ranges import (
    Auto,
    Count,
    PositiveFloat,
    Probability,
)
from compiler.structure import Length, Range
from compiler.units import Interval


@frozen(kw_only=True)
class CropRecipe:
    """How a picture is cut to its bucket."""

    style: Literal["center", "corner", "random", "face", "saliency"] = "center"
    """Where the cut lies. "random" is drawn once for each image, because latents are cached. "face"
    and "saliency" look at the pixels, and need OpenCV: `pip install tuner[crop]`."""
    aspect: Literal["square", "preserve", "closest", "random"] = "preserve"
    """Cut squares, or keep the aspect ratio as nearly as the bucket allows, or take the nearest of
    `buckets`, or one drawn once for each image."""
    buckets: tuple[str, ...] = ()
    """Aspect ratios as "WIDTH:HEIGHT", of aspect "closest" and "random"."""
    resize: Literal["cover", "none"] = "cover"
    """Scale each image to cover its bucket and cut off the rest; "none": cut the bucket out of the
    image at its own size."""


@frozen(kw_only=True)
class CaptionsRecipe:
    """Where captions come from."""

    source: Literal["textfile", "filename", "instance", "json", "column"] = field(
        default="textfile", metadata={"key": "from"}
    )
    """A .txt or .json file beside each image, the file's name, one prompt for all, or a column of
    the table or shard, which is the default for those."""
    prompt: str = ""
    """The prompt of `from = "instance"`, and of `missing = "instance"`."""
    key: str = "caption"
    """Of `from = "json"`: the entry that holds a caption or a list of captions."""
    column: str = "text"
    """Of `from = "column"`: the column that holds a caption or a list of captions."""
    fallback: tuple[str, ...] = ()
    """Of `from = "column"`: columns to take where that one is empty, in this order."""
    missing: Literal["error", "skip", "empty", "filename", "instance"] = "error"
    """What to do with an image that has no caption or an empty one. "empty": train it with the
    empty prompt; "filename" and "instance": take that caption instead."""
    multiline: Literal["join", "first", "alternatives"] = "join"
    """Several lines are one caption, or only the first one counts, or each is a caption of its own,
    one of which is drawn at each use."""
    prefix: str = ""
    """Put before each caption, with a space between."""
    suffix: str = ""
    """Put behind each caption."""
    trigger: str = ""
    """The word that stands for what is learned. It takes the place of `[trigger]` in captions; you
    are warned of captions that do not say it."""
    shuffle: bool = False
    """Shuffle the tags of a caption. Needs `variants`, because embeddings are cached."""
    keep_tokens: Count = 0
    """So many tags at the front keep their place and are never dropped."""
    separator: Annotated[str, Length(ge=1)] = ","
    """What stands between tags."""
    tag_dropout: Probability = 0.0
    """Share of tags that are left out. Needs `variants`, because embeddings are cached."""
    variants: Annotated[int, Range(ge=1, le=1000)] = 1
    """How many shuffled forms of each caption are cached; one of them is drawn at each use."""
    dropout: Probability = 0.0
    """Share of samples that are trained with the empty prompt, for guidance."""


@frozen(kw_only=True)
class RegularisationRecipe:
    """Prior preservation (DreamBooth, arXiv 2208.12242)."""

    weight: PositiveFloat = 1.0
    """The loss of each of these samples is multiplied by it."""
    target: Literal["image", "base"] = "image"
    """What is learned of these samples: the images themselves, or what the frozen base predicts, so
    that the adapter leaves them as they were. "base" costs one more forward pass for them."""


@frozen(kw_only=True)
class MaskRecipe:
    """Which part of each image is learned: white of a mask is, black is not. The loss is averaged
    over that part, so that a small one weighs as much as a whole image."""

    source: Literal["alpha", "file"] = field(metadata={"key": "from"})
    """The image's own transparency (one without any is learned whole), or a file for each."""
    folder: str = ""
    """Of `from = "file"`: where masks lie, each called as its image (relative to the recipe). By
    default beside the images, told from them by `suffix`."""
    suffix: str = ""
    """Of `from = "file"`: what stands behind the image's name in the mask's: "-mask" for
    dog-mask.png beside dog.jpg."""
    floor: Annotated[float, Range(ge=0, lt=1)] = 0.0
    """What the rest of the image counts, beside 1 for what the mask shows."""
    missing: Literal["error", "whole"] = "error"
    """Of `from = "file"`: what to do with an image that has no mask. "whole": learn all of it."""


@frozen(kw_only=True)
class SourceRecipe:
    """One data source. What is left out is taken from `[data]`."""

    path: str
    """A folder of images, or of shards; a .tar (be it compressed), .parquet, .arrow, .jsonl or .csv
    file, or a pattern with `*` for several (relative to the recipe); `hub:owner/name` for a data
    set of the hub, or the URL of a store (`s3://bucket/folder`), which `tuner run` copies."""
    id: str = ""
    """Its name in the plan; by default the folder's."""
    format: Literal["auto", "folder", "webdataset", "parquet", "arrow", "table"] = "auto"
    """What lies at `path`. "auto": as the files' endings say."""
    files: tuple[str, ...] = ()
    """Of a folder or a hub data set: only these tars, shards or tables, as names or patterns below
    it."""
    streaming: bool = False
    """Of tars and Parquet shards that lie elsewhere: read them where they lie and fetch each image
    when it is encoded, instead of copying all of it first."""
    image: str = "auto"
    """Of shards and tables: the column with the image, its path or its URL. "auto": the one that is
    called like it."""
    repeats: Annotated[float, Range(gt=0, le=1_000_000)] = 1.0
    """Passes over the source in each epoch; fractions are allowed, and each bucket's share is
    rounded up."""
    weight: PositiveFloat | None = None
    """Instead of `repeats`, for all sources: they are seen in the ratio of their weights, as nearly
    as their buckets can be divided, and an epoch is as long as it takes to see each image at least
    once."""
    regularisation: RegularisationRecipe | None = None
    """These are images of the class, not of the subject, so that the class is not forgotten."""
    start: Interval | None = field(default=None, metadata={"key": "from"})
    """When it joins: after so many steps or epochs, at the next epoch that begins."""
    until: Interval | None = None
    """When it leaves: after so many steps or epochs, at the next epoch that begins."""
    mask: MaskRecipe | Literal["none"] | None = None
    """Learn only a part of each image. "none": all of it, whatever `[data]` says."""
    holdout: Annotated[float, Range(ge=0, le=1_000_000)] | Literal["all"] = 0.0
    """Images that are not trained on: a share below 1, or a whole number of them. Rows of a table
    that name one image count once, and are held out together. "all": a source that nothing is
    trained on, to be judged by."""
    resolution: PositiveFloat | tuple[PositiveFloat, ...] | None = None
    """Pixels (megapixels for resolution_type = "area"). Of a list, each image is a sample of
    each."""
    resolution_type: Literal["pixel", "area", "pixel_area"] | None = None
    """Whether `resolution` is the short edge, the area in megapixels, or the root of the area."""
    crop: CropRecipe | None = None
    """How pictures are cut."""
    captions: CaptionsRecipe | None = None
    """Where captions come from."""
    min_size: Count | None = None
    """Skip images whose shorter edge has fewer pixels."""
    max_size: Count | None = None
    """Of `resize = "none"`: bring larger images down to a shorter edge of this many pixels before
    they are cut. 0: don't."""
    min_aspect: PositiveFloat | None = None
    """Skip images whose width over height is less."""
    max_aspect: PositiveFloat | None = None
    """Skip images whose width over height is more."""
    upscale: bool | None = None
    """Enlarge images that are smaller than their bucket; false: skip them."""
    flip: bool | None = None
    """Train each image mirrored too, as a sample of its own."""
    broken: Literal["error", "skip"] | None = None
    """What to do with files that are no readable image, and with images whose caption can't be
    read."""


@frozen(kw_only=True)
class DataRecipe:
    """Data sources and the defaults for all of them."""

    source: tuple[SourceRecipe, ...]
    """The sources, one `[[data.source]]` each."""
    resolution: PositiveFloat | tuple[PositiveFloat, ...] | Auto = "auto"
    """Pixels (megapixels for resolution_type = "area"). "auto": the size the base was made for. Of
    a list, each image is a sample of each."""
    resolution_type: Literal["pixel", "area", "pixel_area"] = "pixel_area"
    """Whether `resolution` is the short edge, the area in megapixels, or the root of the area."""
    multiple: Annotated[int, Range(ge=1, le=1024)] | Auto = "auto"
    """Bucket edges are multiples of this many pixels. "auto": 64, or what the family needs."""
    crop: CropRecipe = field(factory=CropRecipe)
    """How pictures are cut."""
    captions: CaptionsRecipe = field(factory=CaptionsRecipe)
    """Where captions come from."""
    mask: MaskRecipe | None = None
    """Learn only a part of each image."""
    min_size: Count = 0
    """Skip images whose shorter edge has fewer pixels."""
    max_size: Count = 0
    """Of `resize = "none"`: bring larger images down to a shorter edge of this many pixels before
    they are cut. 0: don't."""
    min_aspect: PositiveFloat | None = None
    """Skip images whose width over height is less."""
    max_aspect: PositiveFloat | None = None
    """Skip images whose width over height is more."""
    upscale: bool = True
    """Enlarge images that are smaller than their bucket; false: skip them."""
    flip: bool = False
    """Train each image mirrored too, as a sample of its own."""
    broken: Literal["error", "skip"] = "error"
    """What to do with files that are no readable image, and with images whose caption can't be
    read."""
    workers: Annotated[int, Range(ge=1, le=256)] | Auto = "auto"
    """Threads that decode and resize."""
