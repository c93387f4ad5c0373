/* The shapes of the tile unit's eight registers, which each thread sets before it multiplies. */
#pragma once
#include "simd.h"

#if ISA_AMX
#define AMX_ROWS 32 /* of two tiles */

/* Tiles 0 to 3: sums, two by two; 4, 5: rows of x; 6, 7: 32 outputs' weights. All are whole with 32 rows. */
static void amx_configure(int64_t rows)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } __attribute__((packed)) config = {.palette = 1};
    const int64_t first = rows < 16 ? rows : 16, second = rows > 16 ? rows - 16 : 1;
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = 64;
        config.rows[i] = (uint8_t)(i >= 6 ? 16 : i < 4 ? (i < 2 ? first : second) : i == 4 ? first : second);
    }
    __asm__("" : "+m"(config)); /* all of it is read, of which gcc's intrinsic does not tell */
    _tile_loadconfig(&config);
}
#endif
