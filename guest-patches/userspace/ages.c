// SPDX-License-Identifier: GPL-2.0
/* Tests memory that has no age, because it came online without a tracker. */
#include "model.h"

/*
 * The tracker dropped the bits of a section when it went offline. When tracking
 * begins again, the next pass reports all of the section.
 */
void check_ages(void)
{
	/* The model keeps the pages of some sections that go offline. */
	for (int round = 0; round < 16; round++) {
		unsigned long start = section_nr_to_pfn(section_numbers[FIRST_HOTPLUGGED]);

		memory_online(FIRST_HOTPLUGGED);
		must(memory_offline(FIRST_HOTPLUGGED), "a section without users stays online");
		detach();
		memory_online(FIRST_HOTPLUGGED);
		attach();
		pass(0);
		must(pfn_to_page(start)->told, "memory without an age is not reported");
		must(memory_offline(FIRST_HOTPLUGGED), "a section without users stays online");
	}
}
