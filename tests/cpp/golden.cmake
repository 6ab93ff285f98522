# tests/golden.json as C++ tables: one text of the known answers for Python and C++.

# The elements of the array at json[...] as "0x..." words.
function(hex_words out json)
  string(JSON last LENGTH "${json}" ${ARGN})
  math(EXPR last "${last} - 1")
  set(words "")
  foreach(i RANGE ${last})
    string(JSON word GET "${json}" ${ARGN} ${i})
    list(APPEND words 0x${word})
  endforeach()
  list(JOIN words ", " words)
  set(${out} "${words}" PARENT_SCOPE)
endfunction()

# One line "{...}," for each case of a section: fields named in ARGN, as hex:<name>, int:<name>, text:<name> or words:<name>.
function(cases out json section)
  string(JSON last LENGTH "${json}" ${section})
  math(EXPR last "${last} - 1")
  set(lines "")
  foreach(i RANGE ${last})
    set(fields "")
    foreach(field IN LISTS ARGN)
      string(REPLACE ":" ";" field "${field}")
      list(POP_FRONT field kind name)
      if(kind STREQUAL "words")
        hex_words(value "${json}" ${section} ${i} ${name})
        list(APPEND fields "{${value}}")
      else()
        string(JSON value GET "${json}" ${section} ${i} ${name})
        if(kind STREQUAL "hex")
          list(APPEND fields "0x${value}u")
        elseif(kind STREQUAL "text")
          list(APPEND fields "\"${value}\"")
        else()
          list(APPEND fields "${value}u")
        endif()
      endif()
    endforeach()
    list(JOIN fields ", " fields)
    string(APPEND lines "  {${fields}},\n")
  endforeach()
  set(${out} "${lines}" PARENT_SCOPE)
endfunction()

function(write_golden source target)
  file(READ ${source} json)
  cases(philox "${json}" philox_kat words:counter words:key words:out)
  cases(normal "${json}" normal hex:seed int:stream int:offset words:z)
  cases(rademacher "${json}" rademacher hex:seed int:stream int:offset text:z)
  cases(masks "${json}" mask_u16 hex:seed int:stream int:offset words:u)
  cases(rounding "${json}" round_u16 hex:seed int:stream int:offset words:u)
  cases(wide_normal "${json}" normal_wide_stream hex:seed hex:stream int:offset words:z)
  cases(wide_masks "${json}" mask_u16_wide_stream hex:seed hex:stream int:offset words:u)
  cases(wide_rounding "${json}" round_u16_wide_stream hex:seed hex:stream int:offset words:u)
  cases(seeds "${json}" derive_seed hex:run_seed int:step int:k hex:seed)
  file(CONFIGURE OUTPUT ${target} CONTENT [[
// Made from tests/golden.json by golden.cmake.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace golden {
struct Block { uint32_t counter[4], key[2], out[4]; };
struct Words { uint64_t seed; uint64_t stream; uint64_t offset; std::vector<uint32_t> values; };
struct Signs { uint64_t seed; uint64_t stream; uint64_t offset; std::string values; };
struct Seed { uint64_t run_seed, step; uint32_t k; uint64_t seed; };
inline const std::vector<Block> philox = {
@philox@};
inline const std::vector<Words> normal = {
@normal@@wide_normal@};
inline const std::vector<Signs> rademacher = {
@rademacher@};
inline const std::vector<Words> mask_fields = {
@masks@@wide_masks@};
inline const std::vector<Words> rounding_fields = {
@rounding@@wide_rounding@};
inline const std::vector<Seed> derived_seeds = {
@seeds@};
}  // namespace golden
]] @ONLY)
endfunction()
