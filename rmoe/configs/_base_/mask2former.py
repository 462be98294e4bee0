"""Defines the head of Mask2Former (arXiv 2112.01527) for four maps, and how its answers are matched with the truth, as
published for semantic and for instance segmentation.

Configs take these keys out of what they inherit and put them where mmseg or mmdet wants them, such as
decode_head=dict(**_base_.pop("mask2former")) and optim_wrapper=dict(_delete_=True, **_base_.pop("optimization")).
"""

attention = dict(embed_dims=256, num_heads=8, dropout=0.0, batch_first=True)
network = dict(embed_dims=256, num_fcs=2, ffn_drop=0.0, act_cfg=dict(type="ReLU", inplace=True))
places = dict(num_feats=128, normalize=True)
mask2former = dict(
    type="Mask2FormerHead",
    strides=[4, 8, 16, 32],
    feat_channels=256,
    out_channels=256,
    num_queries=100,
    num_transformer_feat_level=3,
    enforce_decoder_input_project=False,
    pixel_decoder=dict(
        type="mmdet.MSDeformAttnPixelDecoder",
        num_outs=3,
        norm_cfg=dict(type="GN", num_groups=32),
        act_cfg=dict(type="ReLU"),
        encoder=dict(
            num_layers=6,
            layer_cfg=dict(
                self_attn_cfg=dict(num_levels=3, num_points=4, **attention),
                ffn_cfg=dict(feedforward_channels=1024, **network),
            ),
        ),
        positional_encoding=places,
    ),
    positional_encoding=places,
    transformer_decoder=dict(
        return_intermediate=True,
        num_layers=9,
        layer_cfg=dict(
            self_attn_cfg=attention,
            cross_attn_cfg=attention,
            ffn_cfg=dict(feedforward_channels=2048, **network),
        ),
    ),
    loss_mask=dict(type="mmdet.CrossEntropyLoss", use_sigmoid=True, reduction="mean", loss_weight=5.0),
    loss_dice=dict(
        type="mmdet.DiceLoss",
        use_sigmoid=True,
        activate=True,
        reduction="mean",
        naive_dice=True,
        eps=1.0,
        loss_weight=5.0,
    ),
)
class_loss = dict(type="mmdet.CrossEntropyLoss", use_sigmoid=False, reduction="mean", loss_weight=2.0)
matching = dict(
    num_points=12544,
    oversample_ratio=3.0,
    importance_sample_ratio=0.75,
    assigner=dict(
        type="mmdet.HungarianAssigner",
        match_costs=[
            dict(type="mmdet.ClassificationCost", weight=2.0),
            dict(type="mmdet.CrossEntropyLossCost", weight=5.0, use_sigmoid=True),
            dict(type="mmdet.DiceCost", weight=5.0, pred_act=True, eps=1.0),
        ],
    ),
    sampler=dict(type="mmdet.MaskPseudoSampler"),
)
optimization = dict(
    optimizer=dict(type="AdamW", lr=1e-5, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="rmoe.ParamGroups",
    clip_grad=dict(max_norm=0.01),
    # the head learns at 1e-4, ten times as fast as the backbone; its tables do not decay
    paramwise_cfg=dict(
        head_lr_mult=10.0,
        custom_keys={name: dict(lr_mult=10.0, decay_mult=0.0) for name in ("query_embed", "query_feat", "level_embed")},
    ),
)
del attention, network, places
