// Codebooks, and nearest-level codes, which code each number alone as the level nearest to it (docs/FORMAT.md, sections
// 3 and 5). Written with the macros of a platform's vocabulary.h, so that all platforms share this one text.

// Magnitudes as float32 bit patterns, ascending.
CONSTANT uint MAGNITUDES_2[4] = {
    0x3E400000u, 0x3F1C0000u, 0x3F8A0000u, 0x3FEE0000u
};
CONSTANT uint MAGNITUDES_3[8] = {
    0x3DE00000u, 0x3E980000u, 0x3F080000u, 0x3F400000u, 0x3F820000u, 0x3FAC0000u, 0x3FE40000u, 0x401E0000u
};
CONSTANT uint MAGNITUDES_4[8] = {
    0x3E0379FDu, 0x3EC6AE44u, 0x3F28215Eu, 0x3F713D39u, 0x3FA0CC2Fu, 0x3FCF1C25u, 0x40046AC7u, 0x402EE2BFu
};
CONSTANT uint MAGNITUDES_8[128] = {
    0x3C0A61E7u, 0x3CCF948Au, 0x3D2CFE97u, 0x3D723720u, 0x3D9BBAC9u, 0x3DBE5DCEu, 0x3DE10579u, 0x3E01D953u,
    0x3E133316u, 0x3E249076u, 0x3E35F1E0u, 0x3E4757C5u, 0x3E58C294u, 0x3E6A32BFu, 0x3E7BA8B7u, 0x3E869278u,
    0x3E8F53EFu, 0x3E9818FBu, 0x3EA0E1D8u, 0x3EA9AEC1u, 0x3EB27FF3u, 0x3EBB55ACu, 0x3EC4302Au, 0x3ECD0FADu,
    0x3ED5F474u, 0x3EDEDEC0u, 0x3EE7CED5u, 0x3EF0C4F5u, 0x3EF9C165u, 0x3F016235u, 0x3F05E726u, 0x3F0A6FA9u,
    0x3F0EFBE4u, 0x3F138BFBu, 0x3F182016u, 0x3F1CB85Cu, 0x3F2154F5u, 0x3F25F60Au, 0x3F2A9BC6u, 0x3F2F4652u,
    0x3F33F5DCu, 0x3F38AA91u, 0x3F3D649Fu, 0x3F422436u, 0x3F46E987u, 0x3F4BB4C4u, 0x3F508622u, 0x3F555DD5u,
    0x3F5A3C15u, 0x3F5F211Bu, 0x3F640D20u, 0x3F690061u, 0x3F6DFB1Du, 0x3F72FD94u, 0x3F780809u, 0x3F7D1ABFu,
    0x3F811B00u, 0x3F83AD0Au, 0x3F8643A4u, 0x3F88DEF6u, 0x3F8B7F29u, 0x3F8E2468u, 0x3F90CEDFu, 0x3F937EBEu,
    0x3F963435u, 0x3F98EF75u, 0x3F9BB0B3u, 0x3F9E7827u, 0x3FA1460Au, 0x3FA41A97u, 0x3FA6F60Eu, 0x3FA9D8B0u,
    0x3FACC2C3u, 0x3FAFB48Eu, 0x3FB2AE5Fu, 0x3FB5B084u, 0x3FB8BB52u, 0x3FBBCF22u, 0x3FBEEC53u, 0x3FC21346u,
    0x3FC54464u, 0x3FC8801Eu, 0x3FCBC6E7u, 0x3FCF193Eu, 0x3FD277A7u, 0x3FD5E2AFu, 0x3FD95AEEu, 0x3FDCE104u,
    0x3FE0759Eu, 0x3FE41975u, 0x3FE7CD50u, 0x3FEB9202u, 0x3FEF6874u, 0x3FF3519Cu, 0x3FF74E89u, 0x3FFB605Eu,
    0x3FFF8859u, 0x4001E3EAu, 0x40041024u, 0x400649ACu, 0x40089165u, 0x400AE84Cu, 0x400D4F78u, 0x400FC821u,
    0x401253A2u, 0x4014F37Fu, 0x4017A972u, 0x401A776Bu, 0x401D5FA3u, 0x402064A4u, 0x4023895Fu, 0x4026D13Fu,
    0x402A404Au, 0x402DDB43u, 0x4031A7DDu, 0x4035AD07u, 0x4039F345u, 0x403E853Du, 0x40437082u, 0x4048C6C8u,
    0x404E9FBFu, 0x40551C3Du, 0x405C6BACu, 0x4064D66Fu, 0x406ED39Fu, 0x407B3DA6u, 0x4085F897u, 0x4093502Au
};

// Magnitudes of the published method, which uses nearest-level codes at every width.
CONSTANT uint PUBLISHED_MAGNITUDES_2[2] = {
    0x3EE7D2C9u, 0x3FC1555Du
};
CONSTANT uint PUBLISHED_MAGNITUDES_3[4] = {
    0x3E7AF9F8u, 0x3F418990u, 0x3FAC0538u, 0x4009B97Au
};

// A code of 3 bits is split over two planes, of 2 bits and of 1 bit; `codes` is the number of codes in a word of the
// first plane.
template <int BITS>
struct Word {
  enum { codes = BITS == 3 ? 16 : 32 / BITS };
};

// Half the variance that coding a key adds to its score, for a scale and a query of norm 1.
DEVICE_FN float score_noise(int bits) {
  return bits == 2 ? 0.0396f : bits == 3 ? 0.0116f : bits == 4 ? 0.0047f : 0.00002f;
}

// The factor on the length of a decoded value, relative to its unbiased length.
DEVICE_FN float value_shrink(int bits) {
  return (bits == 2 ? 501.0f : bits == 3 ? 509.0f : bits == 4 ? 511.0f : 512.0f) / 512.0f;
}

template <int BITS>
DEVICE_FN uint magnitude_bits(uint index) {
  if (BITS == 2) return MAGNITUDES_2[index];
  if (BITS == 3) return MAGNITUDES_3[index];
  if (BITS == 4) return MAGNITUDES_4[index];
  return MAGNITUDES_8[index];
}

template <int BITS>
DEVICE_FN uint nearest_magnitude_bits(uint index) {
  if (BITS == 2) return PUBLISHED_MAGNITUDES_2[index];
  if (BITS == 3) return PUBLISHED_MAGNITUDES_3[index];
  return magnitude_bits<BITS>(index);
}

// The level of a nearest-level code: the top bit is the sign, the other bits index the magnitude.
template <int BITS>
DEVICE_FN float level_of_code(uint code) {
  const uint negative = code >> (BITS - 1);
  const uint index = code & ((1u << (BITS - 1)) - 1u);
  return float_of_bits(nearest_magnitude_bits<BITS>(index) ^ (negative << 31));
}
