#include <stdint.h>
#include <stddef.h>

#define EXPORT __attribute__((visibility("default")))

/* Batches whose rows are tokens and then padding, packed without a look at each in Python. */
typedef struct {
  const int64_t *ids, *mask, *types; /* [rows][columns]; mask and types may be NULL */
  int64_t rows, columns;
  int64_t num_ids, num_types, longest; /* an id and a type lie below these, and a row has at most so many tokens */
  int64_t padding_id;                  /* a token that counts no position, or -1 */
  int64_t first_position;
} batch_t;

static int64_t length_of(const batch_t *batch, int64_t row) {
  if (!batch->mask) return batch->columns;
  const int64_t *mask = batch->mask + row * batch->columns;
  int64_t length = 0;
  while (length < batch->columns && mask[length] == 1) length++;
  for (int64_t column = length; column < batch->columns; column++)
    if (mask[column] != 0) return 0;
  return length;
}

/* The number of tokens, or -1 if anything is out of the ordinary: holes in the mask, a row without tokens, an id outside
   of its table. */
EXPORT int64_t fastcls_count_tokens(const batch_t *batch) {
  int64_t tokens = 0;
  for (int64_t row = 0; row < batch->rows; row++) {
    const int64_t length = length_of(batch, row), start = row * batch->columns;
    if (!length || length > batch->longest) return -1;
    for (int64_t i = start; i < start + length; i++)
      if (batch->ids[i] < 0 || batch->ids[i] >= batch->num_ids || batch->ids[i] == batch->padding_id) return -1;
    for (int64_t i = start; batch->types && i < start + length; i++)
      if (batch->types[i] < 0 || batch->types[i] >= batch->num_types) return -1;
    tokens += length;
  }
  return tokens;
}

/* After a count that was not -1. Returns the longest row. */
EXPORT int64_t fastcls_pack_ids(const batch_t *batch, int32_t *starts, int32_t *positions, int32_t *ids, int32_t *types) {
  int64_t tokens = 0, longest = 0;
  for (int64_t row = 0; row < batch->rows; row++) {
    const int64_t length = length_of(batch, row), start = row * batch->columns;
    starts[row] = (int32_t)tokens;
    for (int64_t i = 0; i < length; i++) {
      ids[tokens + i] = (int32_t)batch->ids[start + i];
      positions[tokens + i] = (int32_t)(batch->first_position + i);
      if (types) types[tokens + i] = (int32_t)batch->types[start + i];
    }
    tokens += length;
    if (length > longest) longest = length;
  }
  starts[batch->rows] = (int32_t)tokens;
  return longest;
}
