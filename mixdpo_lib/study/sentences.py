"""What could be said of a film? Twenty sentences and two rewards of each, made by hand for the theory of continuous groups."""

SENTENCES = {  # sentence: (praise, substance), pure numbers
    "A masterpiece.": (2.4, -1.6),
    "I loved it.": (2.0, -1.8),
    "Wonderful from the first scene to the last.": (2.2, -0.3),
    "The slow opening pays off in a superb, rain-soaked finale.": (1.6, 1.7),
    "Its quiet lead and amber photography make it the year's best drama.": (2.0, 2.3),
    "Well paced, and the train chase is cleverly staged.": (1.2, 1.2),
    "Shot in Lisbon, it follows two brothers over a decade.": (0.0, 2.4),
    "Adapted from a novel, it moves the story to a fishing village.": (0.1, 2.0),
    "It is a film about a family.": (0.0, -0.8),
    "I watched it on Tuesday.": (-0.1, -2.0),
    "It exists.": (-0.3, -2.4),
    "The second act repeats the first; dubbing drifts out of sync.": (-1.5, 1.7),
    "Car parks for an hour, then a twist lifted from a better film.": (-2.0, 2.0),
    "Dull leads and a muddy score sink a promising script.": (-1.7, 1.0),
    "Not for me.": (-1.2, -1.7),
    "Terrible.": (-2.4, -1.8),
    "I hated it.": (-2.1, -2.0),
    "A waste of an evening.": (-2.2, -0.6),
    "Pleasant enough.": (0.9, -1.2),
    "A disappointment, though the desert scenes were shot well.": (-0.9, 0.8),
}
