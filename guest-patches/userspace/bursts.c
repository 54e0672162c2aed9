// SPDX-License-Identifier: GPL-2.0
/*
 * Tests when a burst is held back. The decision depends only on counters, so the
 * tests set these and move no memory. 100 ms pass between two checks.
 */
#include "model.h"

/* Minimum granules of a burst, and the maximum time that it is held back. */
#define ENOUGH 16
#define HELD_MS 2000

static void reported_long_ago(void)
{
	prb_index.reported_at = jiffies - msecs_to_jiffies(HELD_MS);
}

static bool look(unsigned long old, unsigned long young)
{
	struct prb_index *t = &prb_index;
	unsigned long was_old = t->nr_old;
	long was_young = atomic_long_read(&t->nr_young);
	bool held;

	jiffies += msecs_to_jiffies(100);
	t->nr_old = old;
	atomic_long_set(&t->nr_young, young);
	held = prb_hold(ENOUGH, HELD_MS);
	atomic_long_set(&t->nr_young, was_young);
	t->nr_old = was_old;
	return held;
}

static bool ends(unsigned long old, unsigned long young)
{
	struct prb_index *t = &prb_index;
	unsigned long was_old = t->nr_old;
	long was_young = atomic_long_read(&t->nr_young);
	bool ended;

	t->nr_old = old;
	atomic_long_set(&t->nr_young, young);
	ended = prb_burst_ended(ENOUGH);
	atomic_long_set(&t->nr_young, was_young);
	t->nr_old = was_old;
	return ended;
}

/* The per-CPU lists are drained once, after the last free. */
static void check_ends(void)
{
	static const struct { unsigned long old, young; bool ended; } looks[] = {
		/* A few frees are no burst, */
		{ 0, ENOUGH - 1, false }, { ENOUGH - 1, 0, false },
		/* a burst of one moment ends at the next check, and only once, */
		{ 0, 350, false }, { 350, 0, true }, { 4, 0, false }, { 0, 0, false },
		/* and a longer one when it fades. */
		{ 0, 40, false }, { 40, 40, false }, { 80, 40, false }, { 120, 3, true },
		{ 123, 0, false },
		/* Old granules are no burst. */
		{ 1000, 1, false }, { 1000, 0, false },
	};

	for (unsigned int i = 0; i < ARRAY_SIZE(looks); i++)
		must(ends(looks[i].old, looks[i].young) == looks[i].ended,
		     "bursts.c: look %u %s a burst", i, looks[i].ended ? "does not end" : "ends");
}

/* Only the zones that it touched are drained: section 7 is in the second. */
static void check_touched(void)
{
	bitmap_zero(prb_index.touched, MAX_NUMNODES * MAX_NR_ZONES);
	prb_mark_young(section_nr_to_pfn(7), MAX_PAGE_ORDER);
	pass(PRB_AGE_ONLY);
	must(!prb_touched(&zones[0]) && prb_touched(&zones[1]) && !prb_touched(&zones[2]),
	     "bursts.c: the second zone alone was touched");
}

#define expect(held, old, young) \
	must(look(old, young) == (held), "bursts.c:%d: not " #held, __LINE__)

void check_bursts(void)
{
	struct prb_index *t = &prb_index;
	bool was_initial = t->initial;

	must(!t->bytes_per_second, "a bound is set before anything has been");
	mutex_lock(&t->pass_lock);
	t->initial = false;

	/* Freed at once: it leaves as soon as it has reached its age. */
	reported_long_ago();
	expect(true, 0, 350);
	expect(false, 350, 0);

	/* A burst that continues is held back, and its end leaves with it. */
	for (unsigned long old = 0; old < 320; old += 40)
		expect(true, old, 40);
	expect(true, 320, 10);
	expect(true, 330, 10);
	expect(false, 340, 10);
	expect(false, 10, 0);

	/* Its last blocks may be few, and more may follow. */
	expect(true, 0, 320);
	expect(true, 320, 1);
	expect(true, 321, 40);
	expect(true, 361, 1);
	expect(false, 362, 0);

	/* A few stray frees are no burst, even next to due granules. */
	expect(false, 8, 7);
	expect(true, 8, 8);
	expect(false, 1, 0);
	expect(false, 400, 12);

	/* Until it is a full batch, */
	expect(true, full_granules - 1, full_granules);
	expect(false, full_granules, full_granules);
	/* or for two seconds, and then again. */
	for (int i = 0; i < 20; i++)
		expect(true, 16, 16);
	expect(false, 16, 16);
	expect(true, 16, 16);

	/* Small bursts leave together, */
	expect(false, 0, 0);
	prb_index.reported_at = jiffies;
	for (int i = 1; i < 20; i++)
		expect(true, worth_granules - 1, 0);
	expect(false, worth_granules - 1, 0);
	/* large ones separately. */
	prb_index.reported_at = jiffies;
	expect(false, worth_granules, 0);

	/* Granules that the last pass could not take are not due, */
	t->kept = 100;
	expect(false, 110, 5);
	expect(true, 110, 6);
	expect(false, 100 + full_granules, 100);
	t->kept = 0;
	/* and a limit on bytes per second sets its own pace. */
	t->bytes_per_second = 1;
	expect(false, 16, 16);
	t->bytes_per_second = 0;

	/* At first, all memory is due and does not wait. */
	t->initial = true;
	expect(false, 16, 16);

	check_ends();
	t->initial = was_initial;
	t->holding = false;
	mutex_unlock(&t->pass_lock);
	check_touched();
}
