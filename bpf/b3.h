/* b3: trace contexts as B3 multi headers write them, to numbers and back.
 *
 * Pure; compiled natively by the tests against agent/b3.py.
 * Source: openzipkin/b3-propagation, README.
 */
#ifndef PODSPAN_B3_H
#define PODSPAN_B3_H

#define TEXT8(a, b, c, d, e, f, g, h)                                                  \
	((u64)(a) | (u64)(b) << 8 | (u64)(c) << 16 | (u64)(d) << 24 | (u64)(e) << 32 | \
	 (u64)(f) << 40 | (u64)(g) << 48 | (u64)(h) << 56)

static inline u8 hex_digit(u8 nibble)
{
	return nibble + '0' + (((nibble + 6) >> 4) & 1) * 39;
}

/* Without branches: sixteen of these in a row would be 3^16 paths to the verifier. */
static inline u32 hex_value(u8 c, u32 *bad)
{
	u32 no_digit = (u32)((c - '0') | ('9' - c)) >> 31;
	u32 no_letter = (u32)((c - 'a') | ('f' - c)) >> 31;

	*bad |= no_digit & no_letter;
	return (c & 15) + 9 * no_digit;
}

static inline void hex_write(u8 *to, u64 value)
{
	int i;

#pragma clang loop unroll(full)
	for (i = 0; i < 16; i++)
		to[i] = hex_digit((value >> (60 - 4 * i)) & 15);
}

/* 36 chars of a random UUID, version 4, variant 10: RFC 9562 section 5.4. */
static inline void uuid_write(u8 *to, u64 high, u64 low)
{
	int i;

	high = (high & ~0xf000ULL) | 0x4000;
	low = (low & ~(3ULL << 62)) | 2ULL << 62;
#pragma clang loop unroll(disable)
	for (i = 0; i < 16; i++) {
		to[i + (i >= 8) + (i >= 12)] = hex_digit((high >> (60 - 4 * i)) & 15);
		to[19 + i + (i >= 4)] = hex_digit((low >> (60 - 4 * i)) & 15);
	}
	to[8] = '-';
	to[13] = '-';
	to[18] = '-';
	to[23] = '-';
}

/* 16 lower-case digits to a number; `bad` becomes 1 where they are not that. */
static inline u64 hex_read(const u8 *from, u32 *bad)
{
	u64 value = 0;
	int i;

#pragma clang loop unroll(disable)
	for (i = 0; i < 16; i++)
		value = value << 4 | (hex_value(from[i], bad) & 15);
	return value;
}

#endif
